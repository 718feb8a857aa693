/* NCCL of one process: what it has is what all have. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NOTHING(name) \
  int name() { return 0; }

static const size_t COPIED = (size_t)4 << 20; /* as in runtime.c */
static uintptr_t handles = 4096;
static int give(void **group) {
  *group = (void *)__sync_fetch_and_add(&handles, 16);
  return 0;
}

int ncclGetVersion(int *version) {
  *version = 23007;
  return 0;
}
int ncclGetUniqueId(char *id) {
  memset(id, 1, 128);
  return 0;
}
int ncclCommInitRank(void **group) { return give(group); }
int ncclCommInitRankConfig(void **group) { return give(group); }
int ncclCommInitRankScalable(void **group) { return give(group); }
int ncclCommInitAll(void **group) { return give(group); }
int ncclCommSplit(void *group, int color, int key, void **part) { return give(part); }
int ncclCommGetAsyncError(void *group, int *error) { return *error = 0; }
int ncclCommUserRank(void *group, int *rank) { return *rank = 0; }
int ncclCommCuDevice(void *group, int *device) { return *device = 0; }
int ncclCommCount(void *group, int *n) {
  *n = 1;
  return 0;
}
const char *ncclGetErrorString(int error) { return "an error of the null GPU"; }
const char *ncclGetLastError(void *group) { return ""; }

static int same(const void *from, void *to, size_t n, int type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; /* by ncclDataType_t */
  n *= sizes[type];
  if (from != to && n <= COPIED) memcpy(to, from, n);
  return 0;
}
int ncclAllReduce(const void *from, void *to, size_t n, int type) {
  return same(from, to, n, type);
}
int ncclBroadcast(const void *from, void *to, size_t n, int type) {
  return same(from, to, n, type);
}
int ncclReduce(const void *from, void *to, size_t n, int type) { return same(from, to, n, type); }
int ncclAllGather(const void *from, void *to, size_t n, int type) {
  return same(from, to, n, type);
}
int ncclReduceScatter(const void *from, void *to, size_t n, int type) {
  return same(from, to, n, type);
}
int ncclMemAlloc(void **pointer, size_t size) {
  *pointer = malloc(size);
  return 0;
}

NOTHING(ncclBcast)
NOTHING(ncclSend)
NOTHING(ncclRecv)
NOTHING(ncclGroupStart)
NOTHING(ncclGroupEnd)
NOTHING(ncclCommDestroy)
NOTHING(ncclCommAbort)
NOTHING(ncclCommFinalize)
NOTHING(ncclCommShrink)
NOTHING(ncclCommRevoke)
NOTHING(ncclCommSuspend)
NOTHING(ncclCommResume)
NOTHING(ncclCommDump)
NOTHING(ncclCommRegister)
NOTHING(ncclCommDeregister)
NOTHING(ncclCommWindowRegister)
NOTHING(ncclCommWindowDeregister)
NOTHING(ncclMemFree)
NOTHING(ncclRedOpCreatePreMulSum)
NOTHING(ncclRedOpDestroy)
