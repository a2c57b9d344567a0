// Rounds activations to int8 and cuts the products into parts for the threads.

#include "integer8.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "convert.h"
#include "dispatch.h"
#include "integer.h"
#include "pool.h"
#include "scratch.h"

namespace rarefy {
namespace {

constexpr int64_t kAtOnce = 256;       // vectors that are arranged together
constexpr int64_t kColumns = 1 << 16;  // 255 * 128 * this still fits 32 bits

const Int8Kernels& kernels() {
#if defined(RAREFY_X86)
  return pick(&int8_portable, &int8_avx2, &int8_avx512);
#else
  return pick<Int8Kernels>(&int8_portable, nullptr, nullptr);
#endif
}

// The largest absolute value; as bits, so that NaN, whose bits are larger still, is kept.
float peak_of(const float* x, int64_t count) {
  int32_t peak = 0;
  for (int64_t j = 0; j < count; ++j) {
    peak = std::max(peak, bits_as<int32_t>(x[j]) & 0x7FFFFFFF);
  }
  return bits_as<float>(peak);
}

// Codes of one vector; returns its scale, which is NaN where the codes mean nothing.
float quantize(const float* x, int64_t count, const float* given, int8_t* codes, int32_t* total) {
  constexpr float kHalfEven = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  const float peak = peak_of(x, count);
  const bool lost = given != nullptr ? std::isnan(peak) : !std::isfinite(peak);
  const float scale = given != nullptr
                          ? *given
                          : std::max(peak / 127.0f, std::numeric_limits<float>::min());
  int32_t sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    const float code = std::min(std::max(x[j] / scale, -128.0f), 127.0f);
    const int32_t integer = static_cast<int32_t>((code + kHalfEven) - kHalfEven);
    codes[j] = static_cast<int8_t>(integer);
    sum += integer;
  }
  *total = sum;
  return lost ? std::numeric_limits<float>::quiet_NaN() : scale;
}

// The sum of each group's codes, where `sums_of_groups` looks for them.
void add_groups(const rarefy_matrix& m, const int8_t* codes, int32_t* sums, int64_t stride) {
  const int64_t groups = groups_of(m);
  if (groups == 1) return;
  float* out = reinterpret_cast<float*>(sums + stride / 2);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = std::min(m.columns, (g + 1) * m.group);
    int32_t sum = 0;
    for (int64_t j = g * m.group; j < end; ++j) sum += codes[j];
    out[g] = static_cast<float>(sum);
  }
  for (int64_t g = groups; g < round_up(groups, 16); ++g) out[g] = 0.0f;
}

// Pieces of one block of memory, each on a cache line of its own.
struct Layout {
  int64_t stride, own, x, sums, totals, scale, codes, scratch, end;

  Layout(const rarefy_matrix& m, int64_t vectors, int threads) {
    stride = int8_stride(m);
    own = round_up(int8_scratch(m), 16);
    x = 0;
    sums = x + round_up(vectors * stride, 64);
    totals = sums + round_up(vectors * stride * 4, 64);
    scale = totals + round_up(vectors * 4, 64);
    codes = scale + round_up(vectors * 4, 64);
    scratch = codes + threads * stride;
    end = scratch + threads * own * 4;
  }
};

}  // namespace

int64_t int8_scratch(const rarefy_matrix& m) {
  // Of four rows: scales and zero points, of groups and of blocks of at least 16 columns.
  return 4 * (2 * round_up(groups_of(m) + 4, 16) + round_up(m.columns, 128) / 8 + 16);
}

int matvec_int8(const rarefy_matrix& m, const float* x, const float* input_scale, float* y,
                int64_t vectors, Pool& pool, int threads) {
  if (!sound(m) || m.columns > kColumns) return RAREFY_UNSUPPORTED;
  static thread_local Scratch memory;
  const Int8Kernels& k = kernels();
  threads = std::max(1, threads);
  const int64_t most = round_up(std::min(vectors, kAtOnce), kTogether);
  const Layout at(m, most, threads);
  char* base = static_cast<char*>(memory.take(at.end));
  int8_t* arranged = reinterpret_cast<int8_t*>(base + at.x);
  int8_t* codes = reinterpret_cast<int8_t*>(base + at.codes);
  int32_t* sums = reinterpret_cast<int32_t*>(base + at.sums);
  int32_t* totals = reinterpret_cast<int32_t*>(base + at.totals);
  float* scale = reinterpret_cast<float*>(base + at.scale);
  float* scratch = reinterpret_cast<float*>(base + at.scratch);
  const int64_t size = rows_per_part(m, threads);
  for (int64_t first = 0; first < vectors; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, vectors - first);
    pool.each(count < kTogether ? 1 : threads, count, [&](int64_t t, int thread) {
      int8_t* mine = codes + thread * at.stride;
      scale[t] = quantize(x + (first + t) * m.columns, m.columns, input_scale, mine, totals + t);
      k.arrange(m, mine, arranged + t * at.stride, sums + t * at.stride, at.stride);
      add_groups(m, mine, sums + t * at.stride, at.stride);
    });
    pool.each(threads, ceil_div(m.rows, size), [&](int64_t part, int thread) {
      const int64_t row0 = part * size, row1 = std::min(m.rows, row0 + size);
      for (int64_t t = 0; t < count; t += kTogether) {
        const int64_t wanted = std::min<int64_t>(kTogether, count - t);
        const Int8Product p{&m, arranged + t * at.stride, sums + t * at.stride, totals + t,
                            scale + t, at.stride, together(wanted), y + (first + t) * m.rows,
                            wanted};
        k.product(p, row0, row1, scratch + thread * at.own);
      }
    });
  }
  return RAREFY_DONE;
}

int Rounded::product(const rarefy_matrix& m, const float* x, const float* input_scale, float* y,
                     int64_t row0, int64_t row1) {
  if (!sound(m) || m.columns > kColumns) return RAREFY_UNSUPPORTED;
  const Int8Kernels& k = kernels();
  const Layout at(m, kTogether, 1);
  char* base = static_cast<char*>(memory_.take(at.end));
  int8_t* arranged = reinterpret_cast<int8_t*>(base + at.x);
  int32_t* sums = reinterpret_cast<int32_t*>(base + at.sums);
  int32_t* totals = reinterpret_cast<int32_t*>(base + at.totals);
  float* scale = reinterpret_cast<float*>(base + at.scale);
  if (from_ != x || given_ != input_scale || bits_ != m.bits || columns_ != m.columns ||
      group_ != m.group) {
    int8_t* codes = reinterpret_cast<int8_t*>(base + at.codes);
    *scale = quantize(x, m.columns, input_scale, codes, totals);
    k.arrange(m, codes, arranged, sums, at.stride);
    from_ = x;
    given_ = input_scale;
    bits_ = m.bits;
    columns_ = m.columns;
    group_ = m.group;
  }
  const Int8Product p{&m, arranged, sums, totals, scale, at.stride, 1, y - row0, 1};
  k.product(p, row0, row1, reinterpret_cast<float*>(base + at.scratch));
  return RAREFY_DONE;
}

}  // namespace rarefy
