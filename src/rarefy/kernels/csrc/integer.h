// Products with grouped integers (see matrix.h) and float activations.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace rarefy {

// Vectors that are multiplied at once, so that weights are read and decoded once for all of them.
constexpr int kTogether = 8;

struct IntProduct {
  const rarefy_matrix* matrix;
  const float* x;   // [vectors, stride], as `arrange` laid it out
  int64_t stride;   // floats from one vector to the next, at least n rounded up to 64
  int64_t vectors;  // 1, 2, 4 or 8; those behind the last are zeros
  float* y;         // [wanted, m]
  int64_t wanted;   // vectors of which the result is stored
};

struct IntKernels {
  // One vector in the order in which the loop meets the codes, zeros behind its end.
  void (*arrange)(const rarefy_matrix& m, const float* x, float* out, int64_t stride);
  // Rows row0 .. row1 of the product. `scratch`: int_scratch floats for this thread alone.
  void (*product)(const IntProduct& p, int64_t row0, int64_t row1, float* scratch);
  // Rows row0 .. row1 as floats, [row1 - row0, n].
  void (*decode)(const rarefy_matrix& m, int64_t row0, int64_t row1, float* out, float* scratch);
};

// Floats of scratch that a thread needs.
int64_t int_scratch(const rarefy_matrix& m);

// Whether the fields of a matrix of grouped integers agree with each other.
bool sound(const rarefy_matrix& m);

// The number of vectors that a loop is made for, at least `vectors`: 1, 2, 4 or 8.
int together(int64_t vectors);

// Rows that a thread takes at a time: enough for the processor to read ahead.
int64_t rows_per_part(const rarefy_matrix& m, int threads);

extern const IntKernels int_portable;
#if defined(RAREFY_X86)
extern const IntKernels int_avx2;
extern const IntKernels int_avx512;
#endif

int matvec_int(const rarefy_matrix& m, const float* x, float* y, int64_t vectors, Pool& pool,
               int threads);
int decode_int(const rarefy_matrix& m, int64_t row0, int64_t row1, float* out, Pool& pool,
               int threads);
int decode_int_rows(const rarefy_matrix& m, const int64_t* rows, int64_t count, float* out,
                    Pool& pool, int threads);

}  // namespace rarefy
