#include <immintrin.h>

#include "blocked.inl"

namespace rarefy {
namespace {

struct Wide {
  using V = __m512;
  static constexpr int lanes = 16, rows = 14;
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* at) { return _mm512_loadu_ps(at); }
  static V spread(const float* at) { return _mm512_set1_ps(*at); }
  static void store(float* at, V v) { _mm512_storeu_ps(at, v); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

extern const BlockedKernels blocked_avx512 = {Wide::rows, 2 * Wide::lanes, tile_product<Wide>};

}  // namespace rarefy
