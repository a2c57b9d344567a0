#include "soft.h"

#include "dispatch.h"
#include "matrix.h"
#include "pool.h"

namespace {

constexpr int64_t kStrip = 16;  // rows handed out at a time

const rarefy::SoftRounding& kernels() {
  return rarefy::pick(rarefy::soft_rounding_portable(), rarefy::soft_rounding_avx2(),
                      rarefy::soft_rounding_avx512());
}

// Call f(row) for all rows, in strips over the pool's threads.
template <class F>
int rows(const rarefy_ranges* ranges, int threads, F&& f) {
  if (ranges == nullptr || ranges->group < 1 || ranges->rows < 0 || ranges->columns < 0)
    return RAREFY_BAD_ARGUMENT;
  const int64_t strips = (ranges->rows + kStrip - 1) / kStrip;
  rarefy::Pool::shared().each(threads, strips, [&](int64_t strip, int) {
    const int64_t end = (strip + 1) * kStrip < ranges->rows ? (strip + 1) * kStrip : ranges->rows;
    for (int64_t row = strip * kStrip; row < end; ++row) f(row);
  });
  return RAREFY_DONE;
}

}  // namespace

int rarefy_soft_round(const rarefy_ranges* ranges, const float* weight, const float* offset,
                      float* values, int threads) {
  const rarefy::SoftRounding& found = kernels();
  return rows(ranges, threads,
              [&](int64_t row) { found.values(*ranges, row, weight, offset, values); });
}

int rarefy_soft_round_back(const rarefy_ranges* ranges, const float* weight, const float* offset,
                           const float* gradient, float* by_offset, float* sums, int threads) {
  const rarefy::SoftRounding& found = kernels();
  return rows(ranges, threads, [&](int64_t row) {
    found.back(*ranges, row, weight, offset, gradient, by_offset, sums);
  });
}
