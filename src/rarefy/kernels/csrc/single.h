// Products of one vector with grouped integers whose groups are whole steps or half steps of 64 columns:
// what a token of decoding takes most. Sums of a step are integers, or floats where codes have 8 bits
// and there is no better way; scales, zero points and the units of the vector's columns meet before it.
//
//   y[i] = s_x sum_b s[i, b] u_b (sum_{j in b} q[i, j] c[j])  -  s_x sum_g s[i, g] z[i, g] S_g
//
// c are integers in units of s_x u_b, each of three signed octets ("limbs"): 22 bits and a sign, below a
// power of two above the largest number of its 64 columns. S_g are their sums over a group. Both q and z
// are less the middle code: else two large sums would cancel at the end where inputs have one sign.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace rarefy {

constexpr int64_t kStep = 64;  // columns

struct SingleProduct {
  const rarefy_matrix* matrix;
  const uint8_t* x;     // as the step meets it
  const float* sums;    // S_g, zeros behind them to a multiple of 16
  const float* blocks;  // u_b of every step, eight numbers behind them; null where all are 1
  float scale;          // s_x; NaN where a number is not finite
  float* y;             // [m]
};

struct SingleKernels {
  // Whether such a matrix has a product here; the others are for those alone.
  bool (*suits)(const rarefy_matrix& m);
  // The vector as the loop meets it, in `memory` of single_bytes(m). `y` is the caller's.
  SingleProduct (*arrange)(const rarefy_matrix& m, const float* x, void* memory);
  // Rows row0 .. row1 of the product. `scratch`: int_scratch floats for this thread alone.
  void (*product)(const SingleProduct& p, int64_t row0, int64_t row1, float* scratch);
};

// Of the level at hand.
const SingleKernels& single_kernels();

int64_t single_bytes(const rarefy_matrix& m);

#if defined(RAREFY_X86)
extern const SingleKernels single_avx2;
extern const SingleKernels single_avx512;
#endif

}  // namespace rarefy
