// Rounding to a grid with gradients (rarefy/formats/soft.py), one pass over the matrix each way.
//
// Symbols: u = w / s + v a weight's position, c = clip(round(u), low, high) its units, i whether it
// was not clipped, g the gradient of the rounded value. Row-major [m, n]; groups [m, G].
#pragma once

#include <cstdint>

extern "C" {

struct rarefy_ranges {
  int64_t rows, columns;
  int64_t group;  // columns a group
  const float *scale, *low, *high;
};

// values = s c. `offset` is v, or null for 0.
int rarefy_soft_round(const rarefy_ranges* ranges, const float* weight, const float* offset,
                      float* values, int threads);

// by_offset = s i g [m, n]; sums [m, G, 4] = sum of g c, i g w, i g and g over each group.
int rarefy_soft_round_back(const rarefy_ranges* ranges, const float* weight, const float* offset,
                           const float* gradient, float* by_offset, float* sums, int threads);
}

namespace rarefy {

struct SoftRounding {
  void (*values)(const rarefy_ranges&, int64_t row, const float* weight, const float* offset,
                 float* values);
  void (*back)(const rarefy_ranges&, int64_t row, const float* weight, const float* offset,
               const float* gradient, float* by_offset, float* sums);
};

const SoftRounding* soft_rounding_portable();
const SoftRounding* soft_rounding_avx2();
const SoftRounding* soft_rounding_avx512();

}  // namespace rarefy
