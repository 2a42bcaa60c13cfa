// What test_simt.py calls.
#include <cstdio>

#include "../machine.h"

void gemm_sm80(const void* a, const void* b, float* c, int m, int n, int k);
void gemm_sm90(int bug, const void* a, const void* b, float* c, int m, int n, int k);

// c [m][n] = a [m][k] b [n][k]^T in bfloat16; 0, or 1 and what the runner says.
extern "C" __attribute__((visibility("default"))) int simt_gemm(int arch, int bug, const void* a,
                                                                const void* b, float* c, int m,
                                                                int n, int k, char* message,
                                                                int size) {
  try {
    if (arch == 80) {
      gemm_sm80(a, b, c, m, n, k);
    } else {
      gemm_sm90(bug, a, b, c, m, n, k);
    }
  } catch (const simt::Error& error) {
    snprintf(message, size, "%s", error.what());
    return 1;
  }
  return 0;
}
