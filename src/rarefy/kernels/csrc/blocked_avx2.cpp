#include <immintrin.h>

#include "blocked.inl"

namespace rarefy {
namespace {

struct Narrow {
  using V = __m256;
  static constexpr int lanes = 8, rows = 6;
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* at) { return _mm256_loadu_ps(at); }
  static V spread(const float* at) { return _mm256_broadcast_ss(at); }
  static void store(float* at, V v) { _mm256_storeu_ps(at, v); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

extern const BlockedKernels blocked_avx2 = {Narrow::rows, 2 * Narrow::lanes, tile_product<Narrow>};

}  // namespace rarefy
