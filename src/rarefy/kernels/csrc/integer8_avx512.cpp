// VNNI: four products of unsigned weight codes and signed activations into each 32-bit sum.

#include <immintrin.h>

#include "rows8.h"

namespace rarefy {
namespace {

struct Wide {
  using I = __m512i;
  using F = __m512;
  static constexpr int scales = 4, lanes = 16, bytes = 64;
  static constexpr int rows(int together) { return together == 8 ? 2 : 4; }
  static I none() { return _mm512_setzero_si512(); }
  static F load(const float* at) { return _mm512_loadu_ps(at); }
  static F zero() { return _mm512_setzero_ps(); }
  static I sums(const int32_t* at) { return _mm512_loadu_si512(at); }
  static F floats(I v) { return _mm512_cvtepi32_ps(v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static I pairs(I a, I b, I sum) { return _mm512_dpwssd_epi32(sum, a, b); }
  static int32_t total(I v) { return _mm512_reduce_add_epi32(v); }
  static float total(F v) { return _mm512_reduce_add_ps(v); }

  using Pattern = __m512i;
  static Pattern pattern(int64_t many) {  // 1, 2 or 4 blocks of four lanes with one scale
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_srli_epi32(lane, many == 1 ? 2 : many == 2 ? 3 : 4);
  }
  static F spread(const float* at, Pattern places) {
    return _mm512_permutexvar_ps(places, _mm512_castps128_ps512(_mm_loadu_ps(at)));
  }
  static I spread(const int32_t* at, Pattern places) {
    const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm512_permutexvar_epi32(places, _mm512_castsi128_si512(four));
  }
};

struct Bytes : Wide {
  static constexpr bool late = false;
  using Q = __m512i;
  static constexpr int unit = 64, octets = 64;
  static Q codes(const uint8_t* at) { return _mm512_loadu_si512(at); }
  static I dot(Q q, const int8_t* c, I sum) {
    return _mm512_dpbusd_epi32(sum, q, _mm512_loadu_si512(c));
  }
};

struct Nibbles : Wide {
  static constexpr bool late = true;
  struct Q {
    __m512i low, high;
  };
  static constexpr int unit = 128, octets = 128;
  static Q codes(const uint8_t* at) {
    const __m512i both = _mm512_loadu_si512(at), mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask)};
  }
  static I dot(const Q& q, const int8_t* c, I sum) {
    sum = _mm512_dpbusd_epi32(sum, q.low, _mm512_loadu_si512(c));
    return _mm512_dpbusd_epi32(sum, q.high, _mm512_loadu_si512(c + 64));
  }
};

void arrange(const rarefy_matrix& m, const int8_t* c, int8_t* out, int32_t* sums, int64_t stride) {
  if (m.bits == 4 && fits8<Nibbles>(m)) return arrange_nibbles(c, m.columns, 64, out, sums);
  int8_portable.arrange(m, c, out, sums, stride);
  for (int64_t j = 0; j < round_up(m.columns, 64); j += 4) {
    *sums++ = out[j] + out[j + 1] + out[j + 2] + out[j + 3];
  }
}

void product(const Int8Product& p, int64_t row0, int64_t row1, float* scratch) {
  const rarefy_matrix& m = *p.matrix;
  if (m.bits == 4 && fits8<Nibbles>(m)) return product8_of<Nibbles>(p, row0, row1, scratch);
  if (m.bits == 8 && fits8<Bytes>(m)) return product8_of<Bytes>(p, row0, row1, scratch);
  int8_portable.product(p, row0, row1, scratch);
}

}  // namespace

extern const Int8Kernels int8_avx512 = {arrange, product};

}  // namespace rarefy
