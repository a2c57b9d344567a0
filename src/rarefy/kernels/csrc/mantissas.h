// Mantissas, exponents and zero points of a row's scales, eight groups at a time, for tables of the
// products of mantissas (fixed.h). Only for files compiled with AVX2.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace rarefy {
namespace {

// Of each group: `unit` times its scale's power of two, and the place in the table's bytes where its
// values begin. Codes have 2 or 4 bits. Both outputs have room for whole sixteens.
inline void read_mantissas(const rarefy_matrix& m, int64_t row, float unit, float* power,
                           int32_t* offset) {
  const int64_t groups = groups_of(m);
  const bool half = m.scale_type == RAREFY_SCALE_F16;
  const int shift = half ? 13 : 16, mask = half ? 1023 : 127;
  const __m256 due = _mm256_set1_ps(half ? unit / 1024.0f : unit / 128.0f);
  const uint16_t* scales = static_cast<const uint16_t*>(m.scales) + row * groups;
  const int64_t place = row * m.bits;
  const bool packed = !m.symmetric && m.zeros != nullptr;
  const uint32_t* words = static_cast<const uint32_t*>(m.zeros) + (packed ? place / 32 * groups : 0);
  const __m128i down = _mm_cvtsi32_si128(static_cast<int>(place % 32));
  const __m256i first = _mm256_set1_epi32(15);
  const __m256i codes = _mm256_set1_epi32((1 << m.bits) - 1);
  __m256i zero = _mm256_set1_epi32(1 << (m.bits - 1));
  const auto eight = [&](int64_t g, const void* stored, const void* word) RAREFY_INLINE {
    const __m128i sixteen = _mm_loadu_si128(static_cast<const __m128i*>(stored));
    const __m256i bits = half ? _mm256_castps_si256(_mm256_cvtph_ps(sixteen))
                              : _mm256_slli_epi32(_mm256_cvtepu16_epi32(sixteen), 16);
    if (packed) {
      const __m256i found = _mm256_loadu_si256(static_cast<const __m256i*>(word));
      zero = _mm256_and_si256(_mm256_srl_epi32(found, down), codes);
    }
    const __m256i mantissa =
        _mm256_and_si256(_mm256_srli_epi32(bits, shift), _mm256_set1_epi32(mask));
    const __m256i begin = _mm256_sub_epi32(_mm256_slli_epi32(mantissa, 6), zero);
    const __m256i exponent = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xFF800000u)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(offset + g), _mm256_add_epi32(begin, first));
    _mm256_storeu_ps(power + g, _mm256_mul_ps(_mm256_castsi256_ps(exponent), due));
  };
  int64_t g = 0;
  for (; g + 8 <= groups; g += 8) eight(g, scales + g, words + g);
  if (g == groups) return;
  alignas(32) uint32_t near[8] = {};
  alignas(16) uint16_t few[8] = {};
  std::memcpy(few, scales + g, static_cast<size_t>(groups - g) * sizeof(uint16_t));
  if (packed) std::memcpy(near, words + g, static_cast<size_t>(groups - g) * sizeof(uint32_t));
  eight(g, few, near);
}

}  // namespace
}  // namespace rarefy
