// Codes of 64 columns as bytes of two registers, in an order that is cheap to make: `column` says which
// of the columns each byte is. Two scales, of 32 columns each, become scales of the words in which four
// neighbouring bytes of either register meet.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace rarefy {
namespace {

// Both scales by lanes: `places` has a 0 for the first and a 1 for the second.
inline __m256 two_scales(const float* at, __m256i places) {
  const __m256d both = _mm256_broadcast_sd(reinterpret_cast<const double*>(at));
  return _mm256_permutevar_ps(_mm256_castpd_ps(both), places);
}

struct HalvesByLane {
  template <int P>
  static __m256 scales(const float* at) {
    if (P == 1) return _mm256_broadcast_ss(at);
    return two_scales(at, _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0));
  }
};

struct Crumbs {
  static constexpr int bits = 2, bytes = 16;
  static constexpr int column(int place) { return place % 16 * 4 + place / 16; }

  static void split(const uint8_t* codes, __m256i& first, __m256i& second) {
    const __m256i mask = _mm256_set1_epi8(3), low = _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0),
                  high = _mm256_set_epi32(6, 6, 6, 6, 4, 4, 4, 4);
    const __m256i all =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    first = _mm256_and_si256(_mm256_srlv_epi32(all, low), mask);
    second = _mm256_and_si256(_mm256_srlv_epi32(all, high), mask);
  }
  template <int P>
  static __m256 scales(const float* at) {
    if (P == 1) return _mm256_broadcast_ss(at);
    return two_scales(at, _mm256_set_epi32(1, 1, 0, 0, 1, 1, 0, 0));
  }
};

// Four codes are 12 bits. Two bytes that hold them go into 16 bits, from the fifth bit of those on.
struct Threes : HalvesByLane {
  static constexpr int bits = 3, bytes = 24;
  static constexpr int column(int place) {
    return place % 32 / 2 * 4 + place / 32 * 2 + place % 2;
  }

  static void split(const uint8_t* codes, __m256i& first, __m256i& second) {
    const auto sixteen = [](const uint8_t* at) RAREFY_INLINE {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    };
    // The second half of the codes begins at byte 12, which the upper lane has as its fifth.
    const __m256i order = _mm256_set_epi8(15, 14, 14, 13, 12, 11, 11, 10, 9, 8, 8, 7, 6, 5, 5, 4,
                                          11, 10, 10, 9, 8, 7, 7, 6, 5, 4, 4, 3, 2, 1, 1, 0);
    const __m256i raise = _mm256_set1_epi32(0x00010010), low = _mm256_set1_epi16(0x0007),
                  high = _mm256_set1_epi16(0x0700);
    const __m256i some =
        _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(codes)), sixteen(codes + 8), 1);
    const __m256i v = _mm256_mullo_epi16(_mm256_shuffle_epi8(some, order), raise);
    first = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(v, 4), low),
                            _mm256_and_si256(_mm256_slli_epi16(v, 1), high));
    second = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(v, 10), low),
                             _mm256_and_si256(_mm256_srli_epi16(v, 5), high));
  }
};

struct Nibbles : HalvesByLane {
  static constexpr int bits = 4, bytes = 32;
  static constexpr int column(int place) { return place % 32 * 2 + place / 32; }

  static __m256i low(__m256i both) { return _mm256_and_si256(both, _mm256_set1_epi8(15)); }

  static void split(const uint8_t* codes, __m256i& first, __m256i& second) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    first = low(both);
    second = low(_mm256_srli_epi16(both, 4));
  }
};

}  // namespace
}  // namespace rarefy
