// How fast memory can be read here: the limit that products with one vector are measured against.

#include <algorithm>
#include <atomic>

#include "convert.h"
#include "dispatch.h"
#include "matrix.h"
#include "pool.h"

namespace rarefy {
namespace {

typedef uint64_t Words __attribute__((vector_size(64)));  // as wide as loads can be

// Sum of 64-bit words over four streams, as a product reads four rows.
RAREFY_INLINE inline uint64_t sum_of(const uint8_t* data, int64_t bytes) {
  Words sum[4] = {};
  const int64_t stream = bytes / 4 / 64 * 64;
  for (int64_t at = 0; at < stream; at += 64) {
    RAREFY_UNROLL
    for (int k = 0; k < 4; ++k) {
      Words words;
      std::memcpy(&words, data + k * stream + at, sizeof(words));
      sum[k] += words;
    }
  }
  uint64_t whole = 0;
  for (int k = 0; k < 4; ++k) {
    for (int lane = 0; lane < 8; ++lane) whole += sum[k][lane];
  }
  for (int64_t at = 4 * stream; at < bytes; ++at) whole += data[at];
  return whole;
}

using Sum = uint64_t(const uint8_t* data, int64_t bytes);

uint64_t sum_portable(const uint8_t* data, int64_t bytes) { return sum_of(data, bytes); }

#if defined(RAREFY_X86)
__attribute__((target("avx2"))) uint64_t sum_avx2(const uint8_t* data, int64_t bytes) {
  return sum_of(data, bytes);
}

__attribute__((target("avx512f"))) uint64_t sum_avx512(const uint8_t* data, int64_t bytes) {
  return sum_of(data, bytes);
}

Sum* best() { return pick<Sum>(sum_portable, sum_avx2, sum_avx512); }
#else
Sum* best() { return sum_portable; }
#endif

}  // namespace
}  // namespace rarefy

extern "C" uint64_t rarefy_read(const void* data, int64_t bytes, int threads) {
  constexpr int64_t kPart = 1 << 20;
  const uint8_t* base = static_cast<const uint8_t*>(data);
  rarefy::Sum* const sum = rarefy::best();
  std::atomic<uint64_t> total{0};
  const int64_t parts = (bytes + kPart - 1) / kPart;
  rarefy::Pool::shared().each(threads, parts, [&](int64_t part, int) {
    const int64_t start = part * kPart;
    total += sum(base + start, std::min(kPart, bytes - start));
  });
  return total;
}
