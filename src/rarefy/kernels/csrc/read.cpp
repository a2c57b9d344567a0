// How fast memory can be read here: the limit that products with one vector are measured against.

#include <algorithm>
#include <atomic>

#include "convert.h"
#include "matrix.h"
#include "pool.h"

extern "C" uint64_t rarefy_read(const void* data, int64_t bytes, int threads) {
  constexpr int64_t kPart = 64 << 10;
  const uint8_t* base = static_cast<const uint8_t*>(data);
  std::atomic<uint64_t> total{0};
  const int64_t parts = (bytes + kPart - 1) / kPart;
  rarefy::Pool::shared().each(threads, parts, [&](int64_t part, int) {
    // Four streams, as a product reads four rows, so that the processor reads ahead on each.
    uint64_t sum[32] = {};
    const int64_t end = std::min(bytes, (part + 1) * kPart), start = part * kPart;
    const int64_t quarter = (end - start) / 4 / 64 * 64;
    for (int64_t at = start; at < start + quarter; at += 64) {
      for (int stream = 0; stream < 4; ++stream) {
        for (int k = 0; k < 8; ++k) {
          sum[8 * stream + k] += rarefy::load<uint64_t>(base + at + stream * quarter + 8 * k);
        }
      }
    }
    for (int64_t at = start + 4 * quarter; at < end; ++at) sum[0] += base[at];
    uint64_t whole = 0;
    for (uint64_t one : sum) whole += one;
    total += whole;
  });
  return total;
}
