#include <immintrin.h>

#include "dense_rows.h"

namespace rarefy {
namespace {

template <int Kind>
struct Wide {
  static constexpr int lanes = 16;
  using V = __m512;
  using Element = typename ElementOf<Kind>::Type;

  static __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
  static V zero() { return _mm512_setzero_ps(); }
  static V floats(const float* at, int64_t count) {
    return count == lanes ? _mm512_loadu_ps(at) : _mm512_maskz_loadu_ps(first(count), at);
  }
  static V weights(const float* at, int64_t count) { return floats(at, count); }
  static V weights(const uint16_t* at, int64_t count) {
    const __m256i half = count == lanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))
                                        : _mm256_maskz_loadu_epi16(first(count), at);
    if (Kind == RAREFY_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void store(float* at, V v) { _mm512_storeu_ps(at, v); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static float horizontal(V v) { return _mm512_reduce_add_ps(v); }
};

}  // namespace

extern const DenseKernels dense_avx512 = {product_by_kind<Wide>, decode_by_kind<Wide>};

}  // namespace rarefy
