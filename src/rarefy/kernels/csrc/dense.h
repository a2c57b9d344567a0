// Products with dense matrices of float32, float16 or bfloat16 and a few vectors.
#pragma once

#include "integer.h"

namespace rarefy {

struct DenseKernels {
  // Rows row0 .. row1 of y[vectors, m] = x[vectors, n] W^T.
  void (*product)(const rarefy_matrix& m, const float* x, float* y, int64_t vectors, int64_t row0,
                  int64_t row1);
  void (*decode)(const rarefy_matrix& m, int64_t row0, int64_t row1, float* out);
};

extern const DenseKernels dense_portable;
#if defined(RAREFY_X86)
extern const DenseKernels dense_avx2;
extern const DenseKernels dense_avx512;
#endif

int matvec_dense(const rarefy_matrix& m, const float* x, float* y, int64_t vectors, Pool& pool,
                 int threads);
int decode_dense(const rarefy_matrix& m, int64_t row0, int64_t row1, float* out, Pool& pool,
                 int threads);

}  // namespace rarefy
