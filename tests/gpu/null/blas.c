/* cuBLAS: products of matrices are counted and not computed.

The functions are declared without arguments, so that cuBLAS's headers are not needed; only what
answers something has some.
*/
#include <stdint.h>
#include <string.h>

void nullgpu_count_product(void); /* runtime.c */

#define PRODUCT(name)        \
  int name() {               \
    nullgpu_count_product(); \
    return 0;                \
  }
#define NOTHING(name) \
  int name() { return 0; }

static uintptr_t handles = 1 << 20;
static int give(void **handle) {
  *handle = (void *)__sync_fetch_and_add(&handles, 8);
  return 0;
}

PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasCgemm_v2)
PRODUCT(cublasZgemm_v2)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasCgemmStridedBatched)
PRODUCT(cublasZgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasLtMatmul)

NOTHING(cublasDestroy_v2)
NOTHING(cublasSetStream_v2)
NOTHING(cublasSetWorkspace_v2)
NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2)
NOTHING(cublasSetSmCountTarget)
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasLtMatmulAlgoCheck)
NOTHING(cublasLtMatmulAlgoConfigSetAttribute)
NOTHING(cublasLtMatmulAlgoInit)

int cublasCreate_v2(void **handle) { return give(handle); }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
int cublasLtMatmulDescCreate(void **handle, int compute, int scale) { return give(handle); }
int cublasLtMatmulPreferenceCreate(void **handle) { return give(handle); }
int cublasLtMatrixLayoutCreate(void **handle, int type, uint64_t rows, uint64_t columns,
                               int64_t step) {
  return give(handle);
}
size_t cublasLtGetVersion(void) { return 130400; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c,
                                   void *d, void *preference, int asked, void *found, int *count) {
  memset(found, 0, 64); /* of the first, its cublasLtMatmulAlgo_t */
  *count = 1;
  return 0;
}
int cublasLtMatmulAlgoConfigGetAttribute(void *algorithm, int attribute, void *value, size_t size,
                                         size_t *written) {
  memset(value, 0, size);
  if (written) *written = size;
  return 0;
}
