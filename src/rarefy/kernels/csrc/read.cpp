// How fast memory can be read here: the limit that products with one vector are measured against.

#include <algorithm>
#include <atomic>

#include "convert.h"
#include "matrix.h"
#include "pool.h"

extern "C" uint64_t rarefy_read(const void* data, int64_t bytes, int threads) {
  constexpr int64_t kPart = 256 << 10;
  const uint8_t* base = static_cast<const uint8_t*>(data);
  std::atomic<uint64_t> total{0};
  const int64_t parts = (bytes + kPart - 1) / kPart;
  rarefy::Pool::shared().each(threads, parts, [&](int64_t part, int) {
    // Sixteen sums leave room for wide registers and for several loads under way.
    uint64_t sum[16] = {};
    const int64_t end = std::min(bytes, (part + 1) * kPart);
    int64_t at = part * kPart;
    for (; at + 128 <= end; at += 128) {
      for (int k = 0; k < 16; ++k) sum[k] += rarefy::load<uint64_t>(base + at + 8 * k);
    }
    for (; at < end; ++at) sum[0] += base[at];
    uint64_t whole = 0;
    for (uint64_t one : sum) whole += one;
    total += whole;
  });
  return total;
}
