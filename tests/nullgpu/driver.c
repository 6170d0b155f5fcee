// The driver's library, as far as torch and Triton look into it: what Triton compiles is launched here.
#include "count.h"
#include <string.h>

#define HANDLE ((void*)64)
#define GIVES(name, value)                                                                                             \
  int name(void** made) {                                                                                              \
    *made = value;                                                                                                     \
    return 0;                                                                                                          \
  }

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuDeviceGetCount(int* n) {
  *n = 1;
  return 0;
}
int cuDeviceGet(int* device, int i) {
  *device = i;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) { // CUdevice_attribute of cuda.h, for an H100
  static const int values[128] = {
      [1] = 1024,   [8] = 49152,  [10] = 32,  [12] = 65536,  [13] = 1980000, [16] = 132,    [36] = 2619000,
      [37] = 5120,  [39] = 2048,  [75] = 9,   [81] = 233472, [82] = 65536,   [97] = 232448,
  };
  *value = attribute < 128 ? values[attribute] : 0;
  return 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  *flags = 0, *active = 1;
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
static const char* const TEXT = "error of the null GPU";
int cuGetErrorString(int error, const char** text) {
  *text = TEXT;
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* f) { // CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, _NUM_REGS
  *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;
  return 0;
}
int cuPointerGetAttribute(void* value, int attribute, unsigned long long p) {
  *(unsigned long long*)value = p;
  return 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n) {
  *n = 2;
  return 0;
}
int cuOccupancyMaxActiveClusters(int* n) {
  *n = 1;
  return 0;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, cudaStream_t stream) {
  null_count(LAUNCHES, stream);
  return 0;
}
int cuLaunchCooperativeKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, cudaStream_t stream) {
  return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream);
}
struct config {
  unsigned grid[3], block[3], shared;
  cudaStream_t stream;
};
int cuLaunchKernelEx(const struct config* config, void* f) {
  null_count(LAUNCHES, config->stream);
  return 0;
}
GIVES(cuCtxGetCurrent, HANDLE)
GIVES(cuDevicePrimaryCtxRetain, HANDLE)
GIVES(cuLibraryLoadData, HANDLE)
GIVES(cuModuleGetFunction, HANDLE)
GIVES(cuModuleLoad, HANDLE)
GIVES(cuModuleLoadData, HANDLE)
GIVES(cuModuleLoadDataEx, HANDLE)
SUCCEEDS(null_nothing)
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuCtxSynchronize)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)

SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuMemAlloc_v2)
SUCCEEDS(cuMemFree_v2)
SUCCEEDS(cuMemcpyDtoHAsync_v2)
SUCCEEDS(cuMemcpyHtoDAsync_v2)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuPointerGetAttributes)
SUCCEEDS(cuStreamGetCaptureInfo_v2)
SUCCEEDS(cuStreamGetCtx)
SUCCEEDS(cuStreamIsCapturing)
SUCCEEDS(cuStreamSynchronize)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuTensorMapEncodeTiled)
