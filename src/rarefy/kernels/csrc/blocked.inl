// The tile's loop, for a policy W: V, lanes, rows, and load, store, zero, spread, fma.

#include "blocked.h"
#include "convert.h"

namespace rarefy {
namespace {

template <class W>
void tile_product(const float* tile, const float* panel, int64_t depth, float* sums, int64_t stride,
                  bool first, const float* next) {
  constexpr int R = W::rows, L = W::lanes;
  typename W::V sum[R][2];
  RAREFY_UNROLL
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = W::zero();
  for (int64_t k = 0; k < depth; ++k) {
    const typename W::V a = W::load(panel), b = W::load(panel + L);
    __builtin_prefetch(next, 0, 2);
    panel += 2 * L;
    next += L;
    RAREFY_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename W::V weight = W::spread(tile + r * kTileStride + k);
      sum[r][0] = W::fma(weight, a, sum[r][0]);
      sum[r][1] = W::fma(weight, b, sum[r][1]);
    }
  }
  // Blocks are summed apart, which loses less than one sum over all columns.
  RAREFY_UNROLL
  for (int r = 0; r < R; ++r) {
    RAREFY_UNROLL
    for (int half = 0; half < 2; ++half) {
      float* at = sums + r * stride + half * L;
      W::store(at, first ? sum[r][half] : W::add(W::load(at), sum[r][half]));
    }
  }
}

}  // namespace
}  // namespace rarefy
