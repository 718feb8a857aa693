/* A CUDA runtime and driver whose GPU computes nothing.

Preloaded before libcudart (LD_PRELOAD), it shows torch a GPU. All of torch's host side is the real
one then: dispatcher, device checks, autocast, the choice of attention's kernel, caching allocator,
launches, waits. A kernel returns at once. Device memory is address space of the host that copies
alone touch, so that a model of the full size takes next to nothing.

It cannot tell values, time, or the memory that cuDNN takes for itself.

Read when torch first asks for a device:

  NULLGPU_GB       memory of each device, in GiB (80)
  NULLGPU_DEVICES  their number (1)
  NULLGPU_CC       their compute capability, without its point (90)
  NULLGPU_ERROR    what cudaGetDeviceCount answers in place of a number; 35: the driver is too old
  NULLGPU_DRIVER   the newest CUDA that the driver is for (13020 is 13.2)
*/
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define VISIBLE __attribute__((visibility("default")))
#define COUNT(what, n) __atomic_fetch_add(&counts.what, (n), __ATOMIC_RELAXED)

enum { CUDA = 13020, MOST_DEVICES = 16, THREADS = 1024, PROCESSORS = 132 };
static const size_t GIB = (size_t)1 << 30;
static const size_t CONTEXT = (size_t)500 << 20; /* bytes that CUDA takes for itself */
static const size_t COPIED = (size_t)4 << 20;    /* larger copies carry no values: no memory */

/* --- what the host did ------------------------------------------------------------------------ */

/* tests/gpu/null_gpu.py reads these by their order. */
typedef struct {
  long launches;      /* kernels */
  long products;      /* of matrices, by cuBLAS */
  long fills;         /* memsets */
  long from_pageable; /* copies to the device, for which the host waits */
  long from_pinned;   /* copies to the device beside the host's work */
  long to_host;       /* copies from the device */
  long on_device;     /* copies within it */
  long waits;         /* of the host for the device */
} Counts;
static Counts counts;

VISIBLE Counts *nullgpu_counts(void) { return &counts; }
VISIBLE void nullgpu_count_product(void) { COUNT(products, 1); }

/* --- devices ---------------------------------------------------------------------------------- */

static struct {
  size_t bytes;
  int devices, capability, error, driver;
} gpu;
static pthread_once_t read_once = PTHREAD_ONCE_INIT;
static __thread int current = 0;

static double number(const char *name, double otherwise) {
  const char *value = getenv(name);
  return value && *value ? atof(value) : otherwise;
}
static void read_settings(void) {
  gpu.bytes = (size_t)(number("NULLGPU_GB", 80) * GIB);
  gpu.devices = (int)number("NULLGPU_DEVICES", 1);
  gpu.capability = (int)number("NULLGPU_CC", 90);
  gpu.error = (int)number("NULLGPU_ERROR", 0);
  gpu.driver = (int)number("NULLGPU_DRIVER", CUDA);
}
static void settle(void) { pthread_once(&read_once, read_settings); }

cudaError_t cudaGetDeviceCount(int *n) {
  settle();
  *n = gpu.error ? 0 : gpu.devices;
  return gpu.error;
}
cudaError_t cudaGetDevice(int *device) {
  *device = current;
  return 0;
}
cudaError_t cudaSetDevice(int device) {
  settle();
  if (device < 0 || device >= gpu.devices) return cudaErrorInvalidDevice;
  current = device;
  return 0;
}
cudaError_t cudaDriverGetVersion(int *version) {
  settle();
  *version = gpu.driver;
  return 0;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDA;
  return 0;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *is, int device) {
  settle();
  memset(is, 0, sizeof *is);
  strcpy(is->name, "Null GPU");
  memset(&is->uuid, 7 + device, sizeof is->uuid);
  is->totalGlobalMem = gpu.bytes;
  is->major = gpu.capability / 10;
  is->minor = gpu.capability % 10;
  is->multiProcessorCount = PROCESSORS;
  is->warpSize = 32;
  is->maxThreadsPerBlock = is->maxThreadsDim[0] = is->maxThreadsDim[1] = THREADS;
  is->maxThreadsDim[2] = 64;
  is->maxThreadsPerMultiProcessor = 2048;
  is->maxBlocksPerMultiProcessor = 32;
  is->maxGridSize[0] = INT32_MAX;
  is->maxGridSize[1] = is->maxGridSize[2] = UINT16_MAX;
  is->regsPerBlock = is->regsPerMultiprocessor = 65536;
  is->sharedMemPerBlock = 48 << 10;
  is->sharedMemPerBlockOptin = 227 << 10;
  is->sharedMemPerMultiprocessor = 228 << 10;
  is->totalConstMem = 64 << 10;
  is->l2CacheSize = 50 << 20;
  is->memoryBusWidth = 5120;
  is->textureAlignment = 512;
  is->unifiedAddressing = is->concurrentKernels = 1;
  is->asyncEngineCount = 3;
  is->pciBusID = device + 1;
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp is;
  cudaGetDeviceProperties(&is, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = is.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = is.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = is.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = is.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = is.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = is.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = is.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = is.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = is.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = is.maxGridSize[2]; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = is.regsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = is.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = is.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = is.sharedMemPerMultiprocessor; break;
    case cudaDevAttrL2CacheSize: *value = is.l2CacheSize; break;
    default: *value = 1; /* it can */
  }
  return 0;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
  snprintf(id, length, "0000:%02x:00.0", device + 1);
  return 0;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return 0;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) {
  *can = 0;
  return 0;
}
cudaError_t cudaDeviceEnablePeerAccess(int device, unsigned flags) { return 0; }

/* --- memory ----------------------------------------------------------------------------------- */

enum { PAGEABLE = -2, PINNED = -1 }; /* where a range is, if not on a device: 0 and above */
typedef struct Range {
  char *start;
  size_t size;
  int place;
  struct Range *next;
} Range;
static Range *ranges = NULL; /* few, because torch's allocator asks for large ones */
static size_t used[MOST_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void remember(void *start, size_t size, int place) {
  Range *range = malloc(sizeof *range);
  *range = (Range){start, size, place, NULL};
  pthread_mutex_lock(&lock);
  range->next = ranges;
  ranges = range;
  if (place >= 0) used[place] += size;
  pthread_mutex_unlock(&lock);
}
static size_t forget(void *start) {
  size_t size = 0;
  pthread_mutex_lock(&lock);
  for (Range **at = &ranges; *at; at = &(*at)->next) {
    if ((*at)->start != (char *)start) continue;
    Range *gone = *at;
    *at = gone->next;
    size = gone->size;
    if (gone->place >= 0) used[gone->place] -= size;
    free(gone);
    break;
  }
  pthread_mutex_unlock(&lock);
  return size;
}
static int place_of(const void *pointer) {
  int place = PAGEABLE;
  pthread_mutex_lock(&lock);
  for (Range *range = ranges; range; range = range->next) {
    if ((const char *)pointer < range->start || (const char *)pointer >= range->start + range->size)
      continue;
    place = range->place;
    break;
  }
  pthread_mutex_unlock(&lock);
  return place;
}

cudaError_t cudaMalloc(void **pointer, size_t size) {
  settle();
  if (used[current] + size > gpu.bytes) return cudaErrorMemoryAllocation;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  *pointer = size ? mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0) : NULL;
  if (*pointer == MAP_FAILED) return cudaErrorMemoryAllocation;
  if (size) remember(*pointer, size, current);
  return 0;
}
cudaError_t cudaFree(void *pointer) {
  size_t size = pointer ? forget(pointer) : 0;
  if (size) munmap(pointer, size);
  return 0;
}
cudaError_t cudaMallocAsync(void **pointer, size_t size, cudaStream_t s) {
  return cudaMalloc(pointer, size);
}
cudaError_t cudaMallocManaged(void **pointer, size_t size, unsigned flags) {
  return cudaMalloc(pointer, size);
}
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t s) { return cudaFree(pointer); }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  if (posix_memalign(pointer, 4096, size ? size : 1)) return cudaErrorMemoryAllocation;
  remember(*pointer, size, PINNED);
  return 0;
}
cudaError_t cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }
cudaError_t cudaFreeHost(void *pointer) {
  forget(pointer);
  free(pointer);
  return 0;
}
cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
  remember(pointer, size, PINNED);
  return 0;
}
cudaError_t cudaHostUnregister(void *pointer) {
  forget(pointer);
  return 0;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  settle();
  size_t taken = used[current] + CONTEXT;
  *free_bytes = gpu.bytes > taken ? gpu.bytes - taken : 0;
  *total = gpu.bytes;
  return 0;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *is, const void *pointer) {
  memset(is, 0, sizeof *is);
  int place = place_of(pointer);
  is->type = place >= 0        ? cudaMemoryTypeDevice
             : place == PINNED ? cudaMemoryTypeHost
                               : cudaMemoryTypeUnregistered;
  is->device = place >= 0 ? place : 0;
  is->devicePointer = (void *)pointer;
  is->hostPointer = place == PINNED ? (void *)pointer : NULL;
  return 0;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
  *pool = (void *)1;
  return 0;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *value) {
  return 0;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *value) {
  *(uint64_t *)value = 0;
  return 0;
}

/* --- copies ----------------------------------------------------------------------------------- */

/* What no kernel has written is what lay there before. No float of it shall be infinite or NaN, which
   a run would end at. */
static void copy_finite(uint32_t *to, const uint32_t *from, size_t words) {
  const uint32_t exponent = 0x7f800000;
  for (size_t i = 0; i < words; i++)
    to[i] = (from[i] & exponent) == exponent ? 0 : from[i];
}

static void copy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  int target = place_of(to), source = place_of(from);
  if (kind == cudaMemcpyDeviceToDevice || (target >= 0 && source >= 0)) {
    COUNT(on_device, 1);
  } else if (kind == cudaMemcpyHostToDevice || target >= 0) {
    if (source == PINNED) COUNT(from_pinned, 1);
    else COUNT(from_pageable, 1);
    if (size <= COPIED) memcpy(to, from, size);
  } else {
    COUNT(to_host, 1);
    if (size == 1) *(char *)to = 1; /* a bool: what is asked of values, as "all finite", holds */
    else if (size > COPIED) memset(to, 0, size);
    else if (size % 4) memcpy(to, from, size);
    else copy_finite(to, from, size / 4);
  }
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  COUNT(waits, 1);
  copy(to, from, size, kind);
  return 0;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t s) {
  copy(to, from, size, kind);
  return 0;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size,
                                cudaStream_t s) {
  COUNT(on_device, 1);
  return 0;
}
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) {
  return 0;
}
cudaError_t cudaMemset(void *to, int value, size_t size) {
  COUNT(fills, 1);
  return 0;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t s) {
  COUNT(fills, 1);
  if (size <= 1 << 16) memset(to, value, size);
  return 0;
}

/* --- streams and events: whatever is waited for has happened ----------------------------------- */

static uintptr_t handles = 4096; /* of what has no content: no two are equal */
static void *handle(void) { return (void *)__sync_fetch_and_add(&handles, 16); }

cudaError_t cudaStreamCreate(cudaStream_t *s) {
  *s = handle();
  return 0;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
  return cudaStreamCreate(s);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
  return cudaStreamCreate(s);
}
cudaError_t cudaStreamDestroy(cudaStream_t s) { return 0; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return 0; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) {
  *priority = 0;
  return 0;
}
cudaError_t cudaDeviceSynchronize(void) {
  COUNT(waits, 1);
  return 0;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  COUNT(waits, 1);
  return 0;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  COUNT(waits, 1);
  return 0;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { return 0; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t call, void *data,
                                  unsigned flags) {
  call(s, 0, data);
  return 0;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t call, void *data) {
  call(data);
  return 0;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *n) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (n) *n = 0;
  return 0;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *e) {
  *e = handle();
  return 0;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return 0; }
cudaError_t cudaEventQuery(cudaEvent_t e) { return 0; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return 0; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  *ms = 0.1f;
  return 0;
}
cudaError_t cudaGetLastError(void) { return 0; }
cudaError_t cudaPeekAtLastError(void) { return 0; }
cudaError_t cudaProfilerStart(void) { return 0; }
cudaError_t cudaProfilerStop(void) { return 0; }

/* --- kernels ----------------------------------------------------------------------------------- */

/* What nvcc writes around a launch: f<<<grid, block, shared, stream>>>(…) pushes, calls, pops. */
static __thread struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pushed[16];
static __thread int depth = 0;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *s) {
  pushed[depth].grid = grid;
  pushed[depth].block = block;
  pushed[depth].shared = shared;
  pushed[depth++].stream = s;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *s) {
  depth--;
  *grid = pushed[depth].grid;
  *block = pushed[depth].block;
  *shared = pushed[depth].shared;
  *(cudaStream_t *)s = pushed[depth].stream;
  return 0;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t s) {
  COUNT(launches, 1);
  return 0;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **arguments,
                               size_t shared, cudaStream_t s) {
  COUNT(launches, 1);
  return 0;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *f, void **arguments) {
  COUNT(launches, 1);
  return 0;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *f) {
  *kernel = (cudaKernel_t)f;
  return 0;
}
void **__cudaRegisterFatBinary(void *code) {
  static void *room[4];
  return room;
}
void __cudaRegisterFatBinaryEnd(void **h) {}
void __cudaUnregisterFatBinary(void **h) {}
void __cudaRegisterFunction(void **h, const char *f, char *on_device, const char *name, int threads,
                            uint3 *a, uint3 *b, dim3 *c, dim3 *d, int *e) {}
void __cudaRegisterVar(void **h, char *v, char *on_device, const char *name, int outside,
                       size_t size, int constant, int global) {}
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
  static char room[1 << 20];
  *pointer = room;
  return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *is, const void *f) {
  settle();
  memset(is, 0, sizeof *is);
  is->maxThreadsPerBlock = THREADS;
  is->numRegs = 32;
  is->binaryVersion = is->ptxVersion = gpu.capability;
  is->maxDynamicSharedSizeBytes = 227 << 10;
  return 0;
}
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int value) { return 0; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t k, enum cudaFuncAttribute a, int value,
                                            int device) {
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int block,
                                                          size_t shared) {
  *n = 2;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block,
                                                                   size_t shared, unsigned flags) {
  *n = 2;
  return 0;
}

/* --- the driver's own interface, which Triton uses and torch asks for by name -------------------- */

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cuDeviceGetCount(int *n) { return cudaGetDeviceCount(n); }
int cuDeviceGet(int *device, int index) {
  *device = index;
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, attribute, device);
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = (void *)16;
  return 0;
}
int cuCtxGetCurrent(void **context) {
  *context = (void *)16;
  return 0;
}
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { return cudaGetDevice(device); }
int cuCtxGetLimit(size_t *value, int limit) {
  *value = 0;
  return 0;
}
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuGetErrorString(int error, const char **text) {
  *text = "an error of the null GPU";
  return 0;
}
int cuGetErrorName(int error, const char **text) { return cuGetErrorString(error, text); }
int cuModuleLoad(void **module, const char *path) {
  *module = (void *)32;
  return 0;
}
int cuModuleLoadData(void **module, const void *image) { return cuModuleLoad(module, NULL); }
int cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *options, void *values) {
  return cuModuleLoad(module, NULL);
}
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **f, void *module, const char *name) {
  *f = handle();
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *f) {
  *value = attribute == 0 ? THREADS : 0;
  return 0;
}
int cuFuncSetAttribute(void *f, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *f, int config) { return 0; }
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *s, void **arguments, void **more) {
  COUNT(launches, 1);
  return 0;
}
int cuLaunchCooperativeKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                              unsigned by, unsigned bz, unsigned shared, void *s,
                              void **arguments) {
  COUNT(launches, 1);
  return 0;
}
int cuLaunchKernelEx(const void *how, void *f, void **arguments, void **more) {
  COUNT(launches, 1);
  return 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *f, int block, size_t shared) {
  *n = 2;
  return 0;
}
int cuOccupancyMaxActiveClusters(int *n, void *f, const void *how) {
  *n = 2;
  return 0;
}
int cuPointerGetAttribute(void *value, int attribute, unsigned long pointer) {
  *(void **)value = (void *)pointer;
  return 0;
}
int cuStreamIsCapturing(void *s, int *status) {
  *status = 0;
  return 0;
}
int cuStreamGetCtx(void *s, void **context) { return cuCtxGetCurrent(context); }
int cuTensorMapEncodeTiled() { return 0; }
int cuTensorMapEncodeIm2col() { return 0; }
int cuLinkCreate_v2() { return 0; }
int cuLinkAddData_v2() { return 0; }
int cuLinkComplete() { return 0; }

static int granularity(size_t *bytes, const void *properties, int option) {
  *bytes = 2 << 20;
  return 0;
}
static long nothing(void) { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  static const struct {
    const char *name;
    void *f;
  } known[] = {
      {"cuDevicePrimaryCtxGetState", cuDevicePrimaryCtxGetState},
      {"cuCtxGetCurrent", cuCtxGetCurrent},
      {"cuDeviceGetAttribute", cuDeviceGetAttribute},
      {"cuDeviceGet", cuDeviceGet},
      {"cuMemGetAllocationGranularity", granularity},
  };
  *f = nothing;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (!strcmp(name, known[i].name)) *f = known[i].f;
  if (result) *result = cudaDriverEntryPointSuccess;
  return 0;
}
