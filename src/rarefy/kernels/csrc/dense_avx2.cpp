#include <immintrin.h>

#include "dense_rows.h"

namespace rarefy {
namespace {

template <int Kind>
struct Narrow {
  static constexpr int lanes = 8;
  using V = __m256;
  using Element = typename ElementOf<Kind>::Type;

  static V zero() { return _mm256_setzero_ps(); }
  static V floats(const float* at, int64_t count) {
    if (count == lanes) return _mm256_loadu_ps(at);
    float some[lanes] = {};
    std::memcpy(some, at, count * sizeof(float));
    return _mm256_loadu_ps(some);
  }
  static V weights(const float* at, int64_t count) { return floats(at, count); }
  static V weights(const uint16_t* at, int64_t count) {
    uint16_t some[lanes] = {};
    if (count != lanes) {
      std::memcpy(some, at, count * sizeof(uint16_t));
      at = some;
    }
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    if (Kind == RAREFY_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static void store(float* at, V v) { _mm256_storeu_ps(at, v); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static float horizontal(V v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

}  // namespace

extern const DenseKernels dense_avx2 = {product_by_kind<Narrow>, decode_by_kind<Narrow>};

}  // namespace rarefy
