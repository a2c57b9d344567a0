// A vector in fixed point: every 64 columns have a unit, a power of two, and each number is a whole
// count of those, in three signed octets. Only for files compiled with AVX2.
#pragma once

#include "single_rows.h"

namespace rarefy {
namespace {

constexpr int kFixed = 22;  // bits of a number, below its block's power of two

// Bits of the largest magnitude; NaN's are larger than those of any number.
inline int32_t peak(const float* x, int64_t count) {
  __m256i most = _mm256_setzero_si256();
  for (int64_t j = 0; j < count; j += 8) {
    const __m256i bits = _mm256_and_si256(whole(x + j), _mm256_set1_epi32(0x7FFFFFFF));
    most = _mm256_max_epi32(most, bits);
  }
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

// The biased exponent of a power of two above such a magnitude, not so low that its inverse is no float.
inline int above(int32_t peak) { return static_cast<int>(at_least((peak >> 23) + 1, 24)); }

// A power of two; below all floats, 0.
inline float power(int biased) { return bits_as<float>(static_cast<uint32_t>(at_least(biased, 0)) << 23); }

// That of a vector whose largest magnitude has these bits.
inline float scale_of(int32_t largest, int biased) {
  return largest < 0x7F800000 ? power(biased) : bits_as<float>(0x7FC00000);
}

// 32 counts as 32 bytes of each limb, `apart` from one limb to the next: (c ^ m) + m has each octet's
// borrow in the next.
inline void limbs_of(const int32_t* counts, uint8_t* out, int64_t apart) {
  const __m256i bias = _mm256_set1_epi32(0x808080);
  const __m256i by_limb = _mm256_broadcastsi128_si256(
      _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
  __m256i v[4];
  for (int i = 0; i < 4; ++i) {
    const __m256i digits = _mm256_xor_si256(_mm256_add_epi32(whole(counts + 8 * i), bias), bias);
    v[i] = _mm256_shuffle_epi8(digits, by_limb);
  }
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  const __m256i limb[3] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b),
                           _mm256_unpacklo_epi64(c, d)};
  const __m256i natural = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  for (int i = 0; i < 3; ++i) {
    const __m256i sorted = _mm256_permutevar8x32_epi32(limb[i], natural);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * apart), sorted);
  }
}

// Pieces of `memory`: the vector, the sums of its groups and the units of its steps.
struct Pieces {
  uint8_t* x;
  float *sums, *blocks;

  Pieces(const rarefy_matrix& m, void* memory) {
    x = static_cast<uint8_t*>(memory);
    sums = reinterpret_cast<float*>(x + 5 * m.columns);
    blocks = sums + round_up(groups_of(m), 16);
  }
};

// Where the sum of a half step goes.
inline float& sum_of(const rarefy_matrix& m, const Pieces& to, int64_t column) {
  return to.sums[groups_of(m) > 1 ? column / m.group : 0];
}

// Counts of a step's columns as limbs; behind them are the numbers that each lane of a sum begins with, so
// that its codes are less their middle.
template <class Step>
void lay_step(const int32_t* counts, uint8_t* out) {
  alignas(32) int32_t ordered[kStep];
  RAREFY_UNROLL
  for (int place = 0; place < kStep; ++place) ordered[place] = counts[Step::column(place)];
  limbs_of(ordered, out, kStep);
  limbs_of(ordered + 32, out + 32, kStep);
  int32_t start[Step::lanes] = {};
  for (int place = 0; place < kStep; place += 4) {
    const int32_t* four = ordered + place;
    start[place / 4 % Step::lanes] -= Step::middle * (four[0] + four[1] + four[2] + four[3]);
  }
  std::memcpy(out + 3 * kStep, start, sizeof(start));
}

template <class Step>
SingleProduct arrange_limbs(const rarefy_matrix& m, const float* x, void* memory) {
  const Pieces to(m, memory);
  const int32_t largest = peak(x, m.columns);
  const int top = above(largest);
  const __m256i most = _mm256_set1_epi32((1 << kFixed) - 1);
  const __m256i least = _mm256_sub_epi32(_mm256_setzero_si256(), most);
  std::memset(to.sums, 0, round_up(groups_of(m), 16) * sizeof(float));
  for (int64_t j = 0; j < m.columns; j += kStep) {
    alignas(32) int32_t counts[kStep];
    const int own = above(peak(x + j, kStep));
    const __m256 inverse = _mm256_set1_ps(power(254 + kFixed - own));
    const float unit = to.blocks[j / kStep] = power(127 + own - top);
    for (int64_t half = 0; half < kStep; half += kStep / 2) {
      __m256i sum = _mm256_setzero_si256();
      for (int64_t k = half; k < half + kStep / 2; k += 8) {
        const __m256 exact = _mm256_mul_ps(_mm256_loadu_ps(x + j + k), inverse);
        const __m256i near = _mm256_min_epi32(_mm256_cvtps_epi32(exact), most);
        const __m256i some = _mm256_max_epi32(near, least);
        _mm256_store_si256(reinterpret_cast<__m256i*>(counts + k), some);
        sum = _mm256_add_epi32(sum, some);
      }
      sum_of(m, to, j + half) += unit * horizontal(_mm256_cvtepi32_ps(sum));
    }
    Step::lay(m, j / kStep, counts, to.x);
  }
  for (int64_t b = m.columns / kStep, end = b + 8; b < end; ++b) to.blocks[b] = 0.0f;
  return {&m, to.x, to.sums, to.blocks, scale_of(largest, top - kFixed), nullptr};
}

}  // namespace
}  // namespace rarefy
