// The codes of 64 columns are the bytes of one register; VNNI multiplies and adds four of them at a
// time, limb after limb.

#include "limbs.h"

namespace rarefy {
namespace {

// Two scales by lanes; see codes_avx2.h.
inline __m512 two_scales(const float* at, __m512i places) {
  const __m512d both = _mm512_set1_pd(load<double>(at));
  return _mm512_permutevar_ps(_mm512_castpd_ps(both), places);
}

struct Crumbs {
  static constexpr int bits = 2, bytes = 16;
  static constexpr int column(int place) { return place % 16 * 4 + place / 16; }

  static __m512i split(const uint8_t* codes) {
    const __m512i down = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
    const __m512i all =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_and_si512(_mm512_srlv_epi32(all, down), _mm512_set1_epi8(3));
  }
  static __m512i places() { return _mm512_set4_epi32(1, 1, 0, 0); }
};

// Eight pairs of codes are six bytes, which lie in the first words of a lane: two bytes that hold a
// pair are shifted down, and the second of the pair up again.
struct Threes {
  static constexpr int bits = 3, bytes = 24;
  static constexpr int column(int place) { return place; }

  static __m512i split(const uint8_t* codes) {
    const __m512i words = _mm512_set_epi32(7, 6, 5, 4, 6, 5, 4, 3, 4, 3, 2, 1, 3, 2, 1, 0);
    const __m512i order = _mm512_broadcast_i64x4(
        _mm256_set_epi32(0x08070706, 0x06050605, 0x05040403, 0x03020302, 0x06050504, 0x04030403,
                         0x03020201, 0x01000100));
    const __m512i down = _mm512_set1_epi64(0x0002000400060000);
    const __m256i some = _mm256_maskz_loadu_epi32(0x3F, codes);
    const __m512i lanes = _mm512_permutexvar_epi32(words, _mm512_castsi256_si512(some));
    const __m512i pairs = _mm512_srlv_epi16(_mm512_shuffle_epi8(lanes, order), down);
    const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x00FF), pairs,
                                                   _mm512_slli_epi16(pairs, 5), 0xCA);
    return _mm512_and_si512(both, _mm512_set1_epi16(0x0707));
  }
  static __m512i places() { return _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0); }
};

struct Nibbles {
  static constexpr int bits = 4, bytes = 32;
  static constexpr int column(int place) { return place % 32 * 2 + place / 32; }

  static __m512i split(const uint8_t* codes) {
    const __m512i down = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
    const __m512i all = _mm512_broadcast_i64x4(whole(codes));
    return _mm512_and_si512(_mm512_srlv_epi64(all, down), _mm512_set1_epi8(15));
  }
  static __m512i places() { return _mm512_set_epi32(1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0); }
};

// Four products of 128 and less than 2^22 are below 2^31, and what they come from may go round.
struct Bytes {
  static constexpr int bits = 8, bytes = 64;
  static constexpr int column(int place) { return place; }

  static __m512i split(const uint8_t* codes) { return _mm512_loadu_si512(codes); }
  static __m512i places() { return Threes::places(); }
};

template <class Codes>
struct Limbs : Codes {
  using V = __m512;
  using Wide = Limbs;
  static constexpr int steps = 1, lanes = 16, octets = 3 * kStep + 4 * lanes;
  static constexpr int middle = 1 << (Codes::bits - 1);
  __m512i x[3], start;  // low, middle and high limbs, and what lanes begin with

  explicit Limbs(const uint8_t* at)
      : x{_mm512_loadu_si512(at), _mm512_loadu_si512(at + 64), _mm512_loadu_si512(at + 128)},
        start(_mm512_loadu_si512(at + 192)) {}

  static SingleProduct arrange(const rarefy_matrix& m, const float* v, void* memory) {
    return arrange_limbs<Limbs>(m, v, memory);
  }
  static void lay(const rarefy_matrix&, int64_t step, const int32_t* counts, uint8_t* x) {
    lay_step<Limbs>(counts, x + step * octets);
  }

  static V begin(__m256 v) { return _mm512_zextps256_ps512(v); }
  static float total(V v) { return _mm512_reduce_add_ps(v); }

  template <int P>
  V add(const uint8_t* codes, const float* scale, V sum) const {
    const __m512i q = Codes::split(codes);
    __m512i exact = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, x[2]);
    exact = _mm512_dpbusd_epi32(_mm512_slli_epi32(exact, 8), q, x[1]);
    exact = _mm512_add_epi32(_mm512_slli_epi32(exact, 8), start);
    exact = _mm512_dpbusd_epi32(exact, q, x[0]);
    const __m512 by = P == 1 ? _mm512_set1_ps(*scale) : two_scales(scale, Codes::places());
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), by, sum);
  }
};

// Two steps of 4 bits are a register of bytes: the columns of even number are their low halves and
// those of odd number their high ones, and both add to the same sums, one step in each half of a register.
struct TwoSteps {
  static constexpr int steps = 2;
  __m512i low[3], high[3], start;  // limbs for columns of even and of odd number

  explicit TwoSteps(const uint8_t* at) : start(_mm512_loadu_si512(at + 6 * kStep)) {
    for (int i = 0; i < 3; ++i) {
      low[i] = _mm512_loadu_si512(at + 2 * i * kStep);
      high[i] = _mm512_loadu_si512(at + (2 * i + 1) * kStep);
    }
  }

  // The step of number `half` of two.
  static void lay(const int32_t* counts, int64_t half, int middle, uint8_t* out) {
    alignas(32) int32_t even[kStep / 2], odd[kStep / 2], start[8];
    for (int i = 0; i < kStep / 2; ++i) {
      even[i] = counts[2 * i];
      odd[i] = counts[2 * i + 1];
    }
    out += half * kStep / 2;
    limbs_of(even, out, 2 * kStep);
    limbs_of(odd, out + kStep, 2 * kStep);
    for (int i = 0; i < 8; ++i) {
      const int32_t* eight = counts + 8 * i;
      start[i] = 0;
      for (int k = 0; k < 8; ++k) start[i] -= middle * eight[k];
    }
    std::memcpy(out + 6 * kStep, start, sizeof(start));
  }

  template <int P>
  __m512 add(const uint8_t* codes, const float* scale, __m512 sum) const {
    const __m512i both = _mm512_loadu_si512(codes), mask = _mm512_set1_epi8(15);
    const __m512i l = _mm512_and_si512(both, mask);
    const __m512i h = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    __m512i exact = _mm512_dpbusd_epi32(_mm512_setzero_si512(), l, low[2]);
    exact = _mm512_slli_epi32(_mm512_dpbusd_epi32(exact, h, high[2]), 8);
    exact = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(exact, l, low[1]), h, high[1]);
    exact = _mm512_add_epi32(_mm512_slli_epi32(exact, 8), start);
    exact = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(exact, l, low[0]), h, high[0]);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scales<P>(scale), sum);
  }

  template <int P>
  static __m512 scales(const float* at) {
    if (P == 1) return two_scales(at, Threes::places());
    const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(at)), lane);
  }
};

struct Four : Limbs<Nibbles> {
  using Limbs::Limbs;
  using Wide = TwoSteps;

  static SingleProduct arrange(const rarefy_matrix& m, const float* v, void* memory) {
    return arrange_limbs<Four>(m, v, memory);
  }
  static void lay(const rarefy_matrix& m, int64_t step, const int32_t* counts, uint8_t* x) {
    const bool last = step == m.columns / kStep - 1 && step % 2 == 0;
    if (last) return lay_step<Limbs>(counts, x + step * octets);
    TwoSteps::lay(counts, step % 2, middle, x + step / 2 * 2 * octets);
  }
};

}  // namespace

extern const SingleKernels single_avx512 =
    Widths<Limbs<Crumbs>, Limbs<Threes>, Four, Limbs<Bytes>>::table;

}  // namespace rarefy
