// Included once by each soft_*.cpp, which is compiled for one instruction set.
//
// Plain loops that the compiler turns into vectors; -fopenmp-simd lets it reorder the sums.

#include <cmath>

#include "convert.h"
#include "soft.h"

namespace rarefy {
namespace {

// Nearest integer, ties to even, of |x| < 2^22: positions in codes are far smaller.
inline float nearest(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return (x + magic) - magic;
}

inline float within(float x, float low, float high) {
  const float up = x < low ? low : x;
  return up > high ? high : up;
}

// What a zero point has behind its binary point; it is the negative of the least position.
inline float behind_point(float low) { return std::ceil(low) - low; }

template <bool kOffset>
inline void group_values(const float* w, const float* v, float* out, int64_t count, float scale,
                         float low, float high) {
  const float part = behind_point(low);
  low += part, high += part;
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const float u = kOffset ? w[k] / scale + v[k] : w[k] / scale;
    out[k] = (within(nearest(u + part), low, high) - part) * scale;
  }
}

template <bool kOffset>
inline void group_back(const float* w, const float* v, const float* g, float* out, int64_t count,
                       float scale, float low, float high, float* sums) {
  float units = 0, weights = 0, through = 0, all = 0;
  const float part = behind_point(low);
  low += part, high += part;
#pragma omp simd reduction(+ : units, weights, through, all)
  for (int64_t k = 0; k < count; ++k) {
    const float u = nearest((kOffset ? w[k] / scale + v[k] : w[k] / scale) + part);
    const float c = within(u, low, high);
    const float t = u == c ? g[k] : 0.0f;
    units += g[k] * (c - part);
    weights += t * w[k];
    through += t;
    all += g[k];
    out[k] = t * scale;
  }
  sums[0] = units, sums[1] = weights, sums[2] = through, sums[3] = all;
}

void values_of(const rarefy_ranges& r, int64_t row, const float* weight, const float* offset,
               float* values) {
  const int64_t groups = ceil_div(r.columns, r.group);
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t first = row * r.columns + k * r.group, at = row * groups + k;
    const int64_t count = at_most(r.group, r.columns - k * r.group);
    const float *w = weight + first, *v = offset ? offset + first : nullptr;
    const float s = r.scale[at], low = r.low[at], high = r.high[at];
    float* out = values + first;
    if (v) group_values<true>(w, v, out, count, s, low, high);
    else group_values<false>(w, v, out, count, s, low, high);
  }
}

void back_of(const rarefy_ranges& r, int64_t row, const float* weight, const float* offset,
             const float* gradient, float* by_offset, float* sums) {
  const int64_t groups = ceil_div(r.columns, r.group);
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t first = row * r.columns + k * r.group, at = row * groups + k;
    const int64_t count = at_most(r.group, r.columns - k * r.group);
    const float *w = weight + first, *v = offset ? offset + first : nullptr;
    const float s = r.scale[at], low = r.low[at], high = r.high[at];
    if (v) group_back<true>(w, v, gradient + first, by_offset + first, count, s, low, high, sums + 4 * at);
    else group_back<false>(w, v, gradient + first, by_offset + first, count, s, low, high, sums + 4 * at);
  }
}

const SoftRounding kRounding = {values_of, back_of};

}  // namespace
}  // namespace rarefy
