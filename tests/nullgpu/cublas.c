// cuBLAS and cuBLASLt: matrix products are counted, on the stream that was set last.
#include "count.h"
#include <stdint.h>
#include <string.h>

#define HANDLE ((void*)64)

static __thread cudaStream_t current;

#define CREATES(name)                                                                                                  \
  int name(void** made) {                                                                                              \
    *made = HANDLE;                                                                                                    \
    return 0;                                                                                                          \
  }
#define GIVES_ZERO(name)                                                                                               \
  int name(void* handle, int* value) {                                                                                 \
    *value = 0;                                                                                                        \
    return 0;                                                                                                          \
  }
#define MULTIPLIES(name)                                                                                               \
  int name(void) {                                                                                                     \
    null_count(GEMMS, current);                                                                                        \
    return 0;                                                                                                          \
  }

int cublasSetStream_v2(void* handle, cudaStream_t stream) {
  current = stream;
  return 0;
}
CREATES(cublasCreate_v2)
GIVES_ZERO(cublasGetMathMode)
GIVES_ZERO(cublasGetPointerMode_v2)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetSmCountTarget)
MULTIPLIES(cublasSgemm_v2)
MULTIPLIES(cublasDgemm_v2)
MULTIPLIES(cublasGemmEx)
MULTIPLIES(cublasSgemmEx)
MULTIPLIES(cublasGemmStridedBatchedEx)
MULTIPLIES(cublasSgemmStridedBatched)
MULTIPLIES(cublasDgemmStridedBatched)
MULTIPLIES(cublasSgemv_v2)
MULTIPLIES(cublasDgemv_v2)
MULTIPLIES(cublasSdot_v2)
MULTIPLIES(cublasDdot_v2)

size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulAlgoGetHeuristic(void* handle, void* d, void* a, void* b, void* c, void* out, void* preference,
                                   int wanted, void* results, int* found) {
  memset(results, 0, 88); // one cublasLtMatmulHeuristicResult_t: a status of success, no workspace
  *found = 1;
  return 0;
}
int cublasLtMatmul(void* handle, void* d, const void* alpha, const void* A, void* a, const void* B, void* b,
                   const void* beta, const void* C, void* c, void* D, void* out, const void* algorithm, void* workspace,
                   size_t size, cudaStream_t stream) {
  null_count(GEMMS, stream);
  return 0;
}
CREATES(cublasLtMatrixLayoutCreate)
CREATES(cublasLtMatmulDescCreate)
CREATES(cublasLtMatmulPreferenceCreate)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatmulAlgoInit)
SUCCEEDS(cublasLtMatmulAlgoCheck)
SUCCEEDS(cublasLtMatmulAlgoConfigGetAttribute)
SUCCEEDS(cublasLtMatmulAlgoConfigSetAttribute)
