// One vector times grouped integers in fixed point: weights are looked up as the integers that a
// scale's mantissa makes of the codes, the vector is two 14-bit limbs of one unit for all of it, and
// sums are exact integers until the scale's power of two is due, once a group. As exact as floats,
// which keep 24 bits of each number: the vector keeps 27 below its largest one.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace rarefy {

constexpr int kWidest = 256;  // columns that a step takes at most
constexpr int kLimb = 14;     // bits of a limb: both are at most 2^13 in magnitude

struct FixedProduct {
  const rarefy_matrix* matrix;
  const int16_t* x;  // as `arrange` laid it out
  float unit;        // what one step of `x` stands for
  float* y;          // [m]
};

struct FixedKernels {
  // Whether such a matrix has a product here; the others are for those alone.
  bool (*suits)(const rarefy_matrix& m);
  // The vector's limbs in the order in which the loop meets the codes, twice n numbers, n rounded up
  // to kWidest, at an address that 64 divides. Returns their unit, NaN where a number is not finite.
  float (*arrange)(const rarefy_matrix& m, const float* x, int16_t* out);
  // Rows row0 .. row1 of the product. `scratch`: int_scratch floats for this thread alone.
  void (*product)(const FixedProduct& p, int64_t row0, int64_t row1, float* scratch);
};

// Of the level at hand.
const FixedKernels& fixed_kernels();

// The roundings of (integer mantissa) x (-15 .. 15) to the type of the scales, as 16-bit integers: for
// each mantissa 32 low bytes, then 32 high ones. The values of a group with zero point z begin at
// byte 15 - z.
const uint8_t* bytes_of_mantissas(int scale_type);

#if defined(RAREFY_X86)
extern const FixedKernels fixed_avx2;
extern const FixedKernels fixed_avx512;
#endif

}  // namespace rarefy
