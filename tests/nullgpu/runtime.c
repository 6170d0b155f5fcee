// A CUDA runtime that computes nothing: torch's own CUDA code runs on it, and what it asks for is counted.
//
// Kernels are not executed. Device memory is host memory that takes no room until it is touched; copies of at most
// COPY_MAX bytes are made, larger ones only counted, and reads of device memory give zeros unless told otherwise.
// Capture follows the rules of CUDA's programming guide: which streams join, which calls are illegal meanwhile.
#define _GNU_SOURCE
#include "count.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <vector_types.h>

#define COPY_MAX (1 << 16)
#define MAX_RANGES (1 << 16)

static atomic_long counts[NUM_KINDS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used, total = (size_t)81037 << 20; // what torch sees of an H100 of 80 GB
static int zero_reads = 1;
static __thread int device;
static __thread cudaError_t last;

__attribute__((constructor)) static void setup(void) {
  const char* bytes = getenv("NULLGPU_BYTES");
  if (bytes) total = strtoull(bytes, 0, 10);
  if (getenv("NULLGPU_REAL_READS")) zero_reads = 0;
}

long null_counted(int kind) { return counts[kind]; }
void null_read_zeros(int on) { zero_reads = on; }

static cudaError_t fail(cudaError_t error) { return last = error; }

// ---- capture of graphs: one at a time
struct CUstream_st {
  long capture; // number of the capture that the stream belongs to; 0: none
};
struct CUevent_st {
  double seconds;
  long capture; // number of the capture it was recorded in; 0: none; -1: never recorded
};
static atomic_long capture; // number of the one that goes on; 0: none
static long captures, nodes_before;
static atomic_int invalid;
static enum cudaStreamCaptureMode capture_mode;
static pthread_t capture_thread;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

// Handles 0 to 2 stand for the default streams, which can't be captured.
static int is_default(cudaStream_t stream) { return (uintptr_t)stream < 3; }
static int is_captured(cudaStream_t stream) { return capture && !is_default(stream) && stream->capture == capture; }

static cudaError_t invalidate(cudaError_t error) {
  invalid = 1;
  return fail(error);
}

// Error of a call that may be unsafe while a graph is captured (cudaThreadExchangeStreamCaptureMode of the manual).
static cudaError_t unsafe(void) {
  if (!capture || thread_mode == cudaStreamCaptureModeRelaxed) return 0;
  int mine = pthread_equal(pthread_self(), capture_thread);
  int forbidden = mine ? capture_mode != cudaStreamCaptureModeRelaxed
                       : thread_mode == cudaStreamCaptureModeGlobal && capture_mode == cudaStreamCaptureModeGlobal;
  return forbidden ? invalidate(cudaErrorStreamCaptureUnsupported) : 0;
}

void null_count(enum kind kind, cudaStream_t stream) { counts[is_captured(stream) ? NODES : kind]++; }

cudaError_t null_wait(cudaStream_t stream) {
  counts[SYNCS]++;
  return is_captured(stream) ? invalidate(cudaErrorStreamCaptureUnsupported) : unsafe();
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  if (is_default(stream)) return fail(cudaErrorStreamCaptureUnsupported);
  invalid = 0, capture_mode = mode, capture_thread = pthread_self(), nodes_before = counts[NODES];
  stream->capture = capture = ++captures;
  return 0;
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const void* dependencies,
                                          const void* edges, size_t n, enum cudaStreamCaptureMode mode) {
  return cudaStreamBeginCapture(stream, mode);
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  capture = 0;
  *graph = invalid ? 0 : (cudaGraph_t)64;
  return invalid ? fail(cudaErrorStreamCaptureInvalidated) : 0;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  *status = is_captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const void** edges, size_t* n) {
  static const cudaGraphNode_t none;
  if (id) *id = capture;
  if (graph) *graph = (cudaGraph_t)64;
  if (nodes) *nodes = &none;
  if (edges) *edges = 0;
  if (n) *n = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  enum cudaStreamCaptureMode old = thread_mode;
  thread_mode = *mode, *mode = old;
  return 0;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long flags) {
  *made = (cudaGraphExec_t)graph;
  return 0;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  null_count(GRAPHS, stream);
  return 0;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* n) {
  *n = counts[NODES] - nodes_before;
  return 0;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t a, cudaGraphNode_t* b, void* edges, size_t* n) {
  *n = 0;
  return 0;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* p, cudaHostFn_t f, unsigned count, unsigned flags) {
  *object = (cudaUserObject_t)64;
  return 0;
}
SUCCEEDS(cudaStreamUpdateCaptureDependencies)
SUCCEEDS(cudaGraphAddNode)
SUCCEEDS(cudaGraphConditionalHandleCreate)
SUCCEEDS(cudaGraphDestroy)
SUCCEEDS(cudaGraphExecDestroy)
SUCCEEDS(cudaGraphRetainUserObject)
SUCCEEDS(cudaUserObjectRelease)

// ---- streams and events: everything given to a stream is done at once
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  *stream = calloc(1, sizeof **stream);
  return 0;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = 0;
  return 0;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return null_wait(stream); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return unsafe(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  int from_capture = capture && event->capture == capture;
  if (from_capture && is_default(stream)) return invalidate(cudaErrorStreamCaptureImplicit);
  if (from_capture) stream->capture = capture; // the stream joins
  if (!from_capture && is_captured(stream) && event->capture >= 0) return invalidate(cudaErrorStreamCaptureIsolation);
  return 0;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = calloc(1, sizeof **event);
  (*event)->capture = -1;
  return 0;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return 0;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  event->seconds = now.tv_sec + 1e-9 * now.tv_nsec;
  event->capture = is_captured(stream) ? capture : 0;
  return 0;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return unsafe(); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  counts[SYNCS]++;
  return capture && event->capture == capture ? invalidate(cudaErrorCapturedEvent) : unsafe();
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = 1e3 * (end->seconds - begin->seconds);
  return 0;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t f, void* data) {
  f(data);
  return 0;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, void (*f)(cudaStream_t, cudaError_t, void*), void* data) {
  f(stream, 0, data);
  return 0;
}
SUCCEEDS(cudaStreamDestroy)

// ---- kernels: how the compiler's code registers and launches them
static __thread struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pushed[16];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed[depth].grid = grid, pushed[depth].block = block;
  pushed[depth].shared = shared, pushed[depth].stream = stream;
  depth++;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  depth--;
  *grid = pushed[depth].grid, *block = pushed[depth].block;
  *shared = pushed[depth].shared, *(void**)stream = pushed[depth].stream;
  return 0;
}
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t s) {
  null_count(LAUNCHES, s);
  return 0;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t s) {
  return cudaLaunchKernel(f, grid, block, arguments, shared, s);
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared,
                                        cudaStream_t s) {
  return cudaLaunchKernel(f, grid, block, arguments, shared, s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* f, void** arguments) {
  null_count(LAUNCHES, config->stream);
  return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* f) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 232448;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int block, size_t shared,
                                                                   unsigned flags) {
  int fitting = block > 0 ? 2048 / block : 1;
  *n = fitting < 1 ? 1 : fitting > 32 ? 32 : fitting;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int block, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, block, shared, 0);
}
cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  static char memory[1 << 16];
  *p = memory;
  return 0;
}
void** __cudaRegisterFatBinary(void* p) {
  static void* handle[1];
  return handle;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f) {
  *kernel = (cudaKernel_t)f;
  return 0;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t* library) {
  *library = (cudaLibrary_t)64;
  return 0;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library, const char* name) {
  *kernel = (cudaKernel_t)64;
  return 0;
}
int __cudaInitModule(void** handle) { return 1; }
SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaUnregisterFatBinary)
SUCCEEDS(__cudaRegisterVar)
SUCCEEDS(__cudaRegisterManagedVar)
SUCCEEDS(__cudaRegisterFunction)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaKernelSetAttributeForDevice)
SUCCEEDS(cudaLibraryUnload)
SUCCEEDS(cudaMemcpyToSymbol)

// ---- the device: an H100 by its numbers
cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return 0;
}
cudaError_t cudaGetDevice(int* d) {
  *d = device;
  return 0;
}
cudaError_t cudaSetDevice(int d) {
  device = d;
  return 0;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NULL H100");
  p->totalGlobalMem = total, p->major = 9, p->minor = 0, p->multiProcessorCount = 132, p->l2CacheSize = 52428800;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->warpSize = 32, p->totalConstMem = 65536;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->textureAlignment = 512, p->unifiedAddressing = 1, p->memoryBusWidth = 5120, p->asyncEngineCount = 3;
  p->concurrentKernels = 1;
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int d) {
  switch (attribute) {
  case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
  case cudaDevAttrMultiProcessorCount: *value = 132; break;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
  case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
  case cudaDevAttrWarpSize: *value = 32; break;
  case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
  case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
  case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
  case cudaDevAttrMaxGridDimY:
  case cudaDevAttrMaxGridDimZ: *value = 65535; break;
  case cudaDevAttrL2CacheSize: *value = 52428800; break;
  case cudaDevAttrClockRate: *value = 1980000; break;
  case cudaDevAttrMemoryClockRate: *value = 2619000; break;
  default: *value = 0;
  }
  return 0;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b) {
  *can = 1;
  return 0;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int n, int d) {
  strncpy(id, "0000:01:00.0", n);
  return 0;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return 0;
}
cudaError_t cudaDeviceSynchronize(void) {
  counts[SYNCS]++;
  return capture ? invalidate(cudaErrorStreamCaptureUnsupported) : 0;
}
cudaError_t cudaGetLastError(void) {
  cudaError_t error = last;
  last = 0;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : error ? "cudaError" : "cudaSuccess";
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
  case cudaSuccess: return "no error";
  case cudaErrorMemoryAllocation: return "out of memory";
  case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
  case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
  case cudaErrorStreamCaptureImplicit: return "the legacy stream would depend on a capturing stream";
  case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
  case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
  default: return "error of the null GPU";
  }
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** p, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult* result) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  *p = driver ? dlsym(driver, name) : 0;
  if (driver && !*p) *p = dlsym(driver, "null_nothing");
  if (result) *result = *p ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return 0;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int d) {
  *pool = (cudaMemPool_t)64;
  return 0;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void* value) {
  *(size_t*)value = 0;
  return 0;
}
cudaError_t cudaDeviceGetGraphMemAttribute(int d, enum cudaGraphMemAttributeType attribute, void* value) {
  *(size_t*)value = 0;
  return 0;
}
SUCCEEDS(cudaDeviceEnablePeerAccess)
SUCCEEDS(cudaDeviceSetGraphMemAttribute)
SUCCEEDS(cudaMemPoolSetAccess)
SUCCEEDS(cudaMemPoolSetAttribute)
SUCCEEDS(cudaMemPoolTrimTo)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)

// ---- memory: ranges by kind, 1 pinned host memory, 2 device memory, as cudaMemoryType counts
static struct range {
  char* at;
  size_t size;
  int kind;
} ranges[MAX_RANGES];
static int num_ranges;

static void* take(size_t size, int kind) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* p = mmap(0, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (p == MAP_FAILED) return 0;
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < num_ranges && ranges[i].at) i++;
  if (i == MAX_RANGES) abort();
  ranges[i] = (struct range){p, size, kind};
  if (i == num_ranges) num_ranges++;
  pthread_mutex_unlock(&lock);
  return p;
}
static int kind_of(const void* p) {
  int kind = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < num_ranges && !kind; i++)
    if (ranges[i].at && (char*)p >= ranges[i].at && (char*)p < ranges[i].at + ranges[i].size) kind = ranges[i].kind;
  pthread_mutex_unlock(&lock);
  return kind;
}
static void give_back(void* p) {
  pthread_mutex_lock(&lock);
  for (int i = 0; p && i < num_ranges; i++)
    if (ranges[i].at == p) {
      if (ranges[i].kind == cudaMemoryTypeDevice) used -= ranges[i].size;
      munmap(p, ranges[i].size ? ranges[i].size : 1);
      ranges[i].at = 0;
    }
  pthread_mutex_unlock(&lock);
}
cudaError_t cudaMalloc(void** p, size_t size) {
  counts[MALLOCS]++;
  *p = 0;
  if (unsafe()) return last;
  if (used + size > total || !(*p = take(size, cudaMemoryTypeDevice))) return fail(cudaErrorMemoryAllocation);
  used += size;
  return 0;
}
cudaError_t cudaFree(void* p) {
  give_back(p);
  return 0;
}
cudaError_t cudaMallocAsync(void** p, size_t size, cudaStream_t stream) { return cudaMalloc(p, size); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) { return cudaFree(p); }
cudaError_t cudaHostAlloc(void** p, size_t size, unsigned flags) {
  *p = take(size, cudaMemoryTypeHost);
  return *p ? 0 : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *free_bytes = total - used, *total_bytes = total;
  return 0;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* p) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = kind_of(p);
  attributes->hostPointer = attributes->type == cudaMemoryTypeHost ? (void*)p : 0;
  attributes->devicePointer = attributes->type ? (void*)p : 0;
  return 0;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  int to_device = kind_of(to) == cudaMemoryTypeDevice, from_device = kind_of(from) == cudaMemoryTypeDevice;
  int pageable = (to_device && !kind_of(from)) || (from_device && !kind_of(to));
  if (pageable && is_captured(stream)) return invalidate(cudaErrorStreamCaptureUnsupported);
  if (pageable) counts[PAGEABLE]++;
  if (to_device || from_device) null_count(to_device && from_device ? D2D : to_device ? H2D : D2H, stream);
  if (from_device && !to_device && zero_reads)
    memset(to, 0, size);
  else if (size <= COPY_MAX || !(to_device || from_device))
    memmove(to, from, size);
  return 0;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, enum cudaMemcpyKind kind) {
  cudaMemcpyAsync(to, from, size, kind, 0);
  return null_wait(0);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int a, const void* from, int b, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t stream) {
  null_count(MEMSETS, stream);
  if (size <= COPY_MAX) memset(p, value, size);
  return 0;
}
cudaError_t cudaMemset(void* p, int value, size_t size) { return cudaMemsetAsync(p, value, size, 0); }
cudaError_t cudaIpcOpenMemHandle(void) { return cudaErrorNotSupported; }
cudaError_t cudaIpcOpenEventHandle(void) { return cudaErrorNotSupported; }
SUCCEEDS(cudaHostRegister)
SUCCEEDS(cudaHostUnregister)
SUCCEEDS(cudaIpcGetMemHandle)
SUCCEEDS(cudaIpcCloseMemHandle)
SUCCEEDS(cudaIpcGetEventHandle)
