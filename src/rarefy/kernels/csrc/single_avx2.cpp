// Products of unsigned codes and signed limbs into 16 bits are exact up to 4 bits. Codes of 8 bits
// become floats: they would have to be widened in any case.

#include "codes_avx2.h"
#include "limbs.h"

namespace rarefy {
namespace {

struct Eight {
  using V = __m256;
  static V begin(__m256 v) { return v; }
  static float total(V v) { return horizontal(v); }
};

template <class Codes>
struct Limbs : Codes, Eight {
  using Wide = Limbs;
  static constexpr int steps = 1, lanes = 8, octets = 3 * kStep + 4 * lanes;
  static constexpr int middle = 1 << (Codes::bits - 1);
  __m256i x[3][2], start;  // low, middle and high limbs, and what lanes begin with

  explicit Limbs(const uint8_t* at)
      : x{{whole(at), whole(at + 32)},
          {whole(at + 64), whole(at + 96)},
          {whole(at + 128), whole(at + 160)}},
        start(whole(at + 192)) {}

  static SingleProduct arrange(const rarefy_matrix& m, const float* v, void* memory) {
    return arrange_limbs<Limbs>(m, v, memory);
  }
  static void lay(const rarefy_matrix&, int64_t step, const int32_t* counts, uint8_t* x) {
    lay_step<Limbs>(counts, x + step * octets);
  }

  template <int P>
  V add(const uint8_t* codes, const float* scale, V sum) const {
    __m256i first, second, four[3];
    Codes::split(codes, first, second);
    RAREFY_UNROLL
    for (int i = 0; i < 3; ++i) {
      four[i] = _mm256_add_epi16(_mm256_maddubs_epi16(first, x[i][0]),
                                 _mm256_maddubs_epi16(second, x[i][1]));
    }
    const __m256i one = _mm256_set1_epi16(1), octet = _mm256_set1_epi16(256);
    const __m256i upper =
        _mm256_add_epi32(_mm256_madd_epi16(four[2], octet), _mm256_madd_epi16(four[1], one));
    const __m256i exact =
        _mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32(upper, 8), start),
                         _mm256_madd_epi16(four[0], one));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), Codes::template scales<P>(scale), sum);
  }
};

struct Floats : Eight {
  using Wide = Floats;
  static constexpr int steps = 1, bits = 8, bytes = 64, octets = 5 * kStep, middle = 128;
  const float* x;

  explicit Floats(const uint8_t* at) : x(reinterpret_cast<const float*>(at)) {}

  static SingleProduct arrange(const rarefy_matrix& m, const float* v, void* memory) {
    const Pieces to(m, memory);
    // Sums of codes times numbers close to the largest float would be none.
    const int32_t largest = peak(v, m.columns);
    const int top = above(largest);
    const __m256 inverse = _mm256_set1_ps(power(256 - top));
    std::memset(to.sums, 0, round_up(groups_of(m), 16) * sizeof(float));
    for (int64_t j = 0; j < m.columns; j += kStep / 2) {
      float* out = reinterpret_cast<float*>(to.x + j / kStep * octets);
      const int64_t half = j % kStep;
      __m256 sum = _mm256_setzero_ps();
      for (int64_t k = 0; k < kStep / 2; k += 8) {
        const __m256 some = _mm256_mul_ps(_mm256_loadu_ps(v + j + k), inverse);
        _mm256_storeu_ps(out + half + k, some);
        sum = _mm256_add_ps(sum, some);
      }
      _mm256_storeu_ps(out + kStep + half / 4, _mm256_mul_ps(sum, _mm256_set1_ps(-middle)));
      sum_of(m, to, j) += horizontal(sum);
    }
    return {&m, to.x, to.sums, nullptr, scale_of(largest, top - 2), nullptr};
  }

  __m256 eight(const uint8_t* codes, int j, __m256 sum) const {
    const __m128i some = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + j));
    const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(some));
    return _mm256_fmadd_ps(code, _mm256_loadu_ps(x + j), sum);
  }
  template <int P>
  V add(const uint8_t* codes, const float* scale, V sum) const {
    __m256 half[2];
    for (int h = 0; h < 2; ++h) {
      half[h] = _mm256_loadu_ps(x + kStep + 8 * h);
      for (int j = 32 * h; j < 32 * h + 32; j += 8) half[h] = eight(codes, j, half[h]);
    }
    if (P == 1) {
      return _mm256_fmadd_ps(_mm256_add_ps(half[0], half[1]), _mm256_broadcast_ss(scale), sum);
    }
    sum = _mm256_fmadd_ps(half[0], _mm256_broadcast_ss(scale), sum);
    return _mm256_fmadd_ps(half[1], _mm256_broadcast_ss(scale + 1), sum);
  }
};

}  // namespace

extern const SingleKernels single_avx2 =
    Widths<Limbs<Crumbs>, Limbs<Threes>, Limbs<Nibbles>, Floats>::table;

}  // namespace rarefy
