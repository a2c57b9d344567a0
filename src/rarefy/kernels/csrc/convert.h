// Scalars of the stored types as float, and each row's scales and zero points.
//
// Everything is in an unnamed namespace: each including file compiles it with its own instructions,
// and the linker must never put one file's code in the place of another's. For the same reason the
// files of the kernels use no templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#include "matrix.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define RAREFY_UNROLL _Pragma("clang loop unroll(full)")
#else
#define RAREFY_UNROLL _Pragma("GCC unroll 16")
#endif

#define RAREFY_INLINE __attribute__((always_inline))

namespace rarefy {
namespace {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Any unaligned little-endian value.
template <class T>
inline T load(const void* at) {
  T value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

inline float from_bf16(uint16_t h) { return bits_as<float>(static_cast<uint32_t>(h) << 16); }

// Multiplication by 2^112 moves the exponent's bias and normalises subnormal numbers.
inline float from_f16(uint16_t h) {
  const uint32_t magnitude = (h & 0x7FFFu) << 13;
  const float small = bits_as<float>(magnitude) * bits_as<float>(0x77800000u);
  const uint32_t special = (h & 0x7C00u) == 0x7C00u ? magnitude | 0x7F800000u : 0u;
  const uint32_t found = special ? special : bits_as<uint32_t>(small);
  return bits_as<float>(found | static_cast<uint32_t>(h & 0x8000u) << 16);
}

// Fetch a cache line that will be needed; any address will do.
inline void ahead(const void* at) { __builtin_prefetch(at); }

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int64_t groups_of(const rarefy_matrix& m) {
  return m.group > 0 && m.group < m.columns ? ceil_div(m.columns, m.group) : 1;
}

inline const uint8_t* row_codes(const rarefy_matrix& m, int64_t row) {
  return static_cast<const uint8_t*>(m.codes) + row * m.words_per_row * 4;
}

inline int zero_bits_of(const rarefy_matrix& m) { return m.zero_bits > 0 ? m.zero_bits : m.bits; }

// Zero points are whole numbers over this.
inline int zero_steps(const rarefy_matrix& m) {
  return m.symmetric || m.zeros == nullptr ? 1 : 1 << (zero_bits_of(m) - m.bits);
}

inline void row_scales(const rarefy_matrix& m, int64_t row, float* scale) {
  const int64_t groups = groups_of(m);
  if (m.scale_type == RAREFY_SCALE_F16) {
    const uint16_t* from = static_cast<const uint16_t*>(m.scales) + row * groups;
    int64_t g = 0;
#if defined(__F16C__)
    for (; g + 8 <= groups; g += 8) {
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + g));
      _mm256_storeu_ps(scale + g, _mm256_cvtph_ps(eight));
    }
#endif
    for (; g < groups; ++g) scale[g] = from_f16(from[g]);
  } else if (m.scale_type == RAREFY_SCALE_BF16) {
    const uint16_t* from = static_cast<const uint16_t*>(m.scales) + row * groups;
    for (int64_t g = 0; g < groups; ++g) scale[g] = from_bf16(from[g]);
  } else if (m.scale_type == RAREFY_SCALE_U8) {
    const uint8_t* from = static_cast<const uint8_t*>(m.scales) + row * groups;
    for (int64_t g = 0; g < groups; ++g) scale[g] = m.units[row] * static_cast<float>(from[g]);
  } else {
    std::memcpy(scale, static_cast<const float*>(m.scales) + row * groups, groups * sizeof(float));
  }
}

inline void row_zeros(const rarefy_matrix& m, int64_t row, float* zero) {
  const int64_t groups = groups_of(m);
  if (m.symmetric || m.zeros == nullptr) {
    for (int64_t g = 0; g < groups; ++g) zero[g] = static_cast<float>(1 << (m.bits - 1));
    return;
  }
  // Packed along rows: the words of one row lie side by side, and of 3, 5, 6 or 7 bits some come
  // from two words.
  const int bits = zero_bits_of(m);
  const int64_t at = row * bits;
  const int shift = static_cast<int>(at % 32);
  const uint32_t mask = (1u << bits) - 1;
  const uint32_t* word = static_cast<const uint32_t*>(m.zeros) + at / 32 * groups;
  const uint32_t* next = shift + bits <= 32 ? word : word + groups;
  const float step = 1.0f / static_cast<float>(zero_steps(m));
  for (int64_t g = 0; g < groups; ++g) {
    const uint64_t joined = static_cast<uint64_t>(next[g]) << 32 | word[g];
    zero[g] = static_cast<float>(static_cast<int32_t>(joined >> shift & mask)) * step;
  }
}

}  // namespace
}  // namespace rarefy
