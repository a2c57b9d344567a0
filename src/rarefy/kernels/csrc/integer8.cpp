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

// AVX-512 has loops of its own for 4 and 8 bits and zero points among the codes, and none where columns of
// a vector have scales of their own: there 64 of them are one step of AVX2, and half a step of AVX-512. One
// vector and small groups of 4 bits are those steps, too: a step costs less than its share of a wide one.
const Int8Kernels& kernels(const rarefy_matrix& m, int64_t input_group, int64_t vectors) {
#if defined(RAREFY_X86)
  const bool steps = vectors == 1 && groups_of(m) > 1 && m.group % (kInputGroup / 2) == 0;
  const bool fits = m.bits == 8 || (m.bits == 4 && !steps);
  const bool wide = fits && input_group == 0 && zero_steps(m) == 1;
  return pick(&int8_portable, &int8_avx2, wide ? &int8_avx512 : &int8_avx2);
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

// The same with a scale for every kInputGroup columns: those scales, zeros behind them.
void quantize_groups(const float* x, int64_t count, int8_t* codes, float* scale, int64_t room) {
  int32_t total;
  int64_t g = 0;
  for (int64_t j = 0; j < count; j += kInputGroup) {
    scale[g++] = quantize(x + j, std::min(kInputGroup, count - j), nullptr, codes + j, &total);
  }
  std::fill(scale + g, scale + room, 0.0f);
}

// The sum of each group's codes, times their scales, where `sums_of_groups` looks for them.
void add_groups(const rarefy_matrix& m, const int8_t* codes, const float* scales, int32_t* sums,
                int64_t stride) {
  const int64_t groups = groups_of(m), group = groups > 1 ? m.group : m.columns;
  float* out = reinterpret_cast<float*>(sums + stride / 2);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = std::min(m.columns, (g + 1) * group);
    float total = 0.0f;
    for (int64_t j = g * group; j < end;) {
      const int64_t next = scales ? std::min(end, round_up(j + 1, kInputGroup)) : end;
      const float scale = scales ? scales[j / kInputGroup] : 1.0f;
      int32_t sum = 0;
      for (; j < next; ++j) sum += codes[j];
      total += scale * static_cast<float>(sum);
    }
    out[g] = total;
  }
  for (int64_t g = groups; g < round_up(groups, 16); ++g) out[g] = 0.0f;
}

// Pieces of one block of memory, each on a cache line of its own.
struct Layout {
  int64_t stride, own, x, sums, totals, scale, blocks, codes, scratch, end;

  Layout(const rarefy_matrix& m, int64_t vectors, int threads) {
    stride = int8_stride(m);
    own = round_up(int8_scratch(m), 16);
    x = 0;
    sums = x + round_up(vectors * stride, 64);
    totals = sums + round_up(vectors * stride * 4, 64);
    scale = totals + round_up(vectors * 4, 64);
    blocks = scale + round_up(vectors * 4, 64);
    codes = blocks + vectors * int8_blocks(stride) * 4;
    scratch = codes + threads * stride;
    end = scratch + threads * own * 4;
  }
};

// Vectors on their way to a product, in memory that a Layout divides.
struct Prepared {
  Layout at;
  int8_t *x, *codes;
  int32_t *sums, *totals;
  float *scale, *blocks, *scratch;
  bool grouped;

  Prepared(const Layout& layout, void* memory, int64_t input_group)
      : at(layout), grouped(input_group > 0) {
    char* base = static_cast<char*>(memory);
    x = reinterpret_cast<int8_t*>(base + at.x);
    codes = reinterpret_cast<int8_t*>(base + at.codes);
    sums = reinterpret_cast<int32_t*>(base + at.sums);
    totals = reinterpret_cast<int32_t*>(base + at.totals);
    scale = reinterpret_cast<float*>(base + at.scale);
    blocks = reinterpret_cast<float*>(base + at.blocks);
    scratch = reinterpret_cast<float*>(base + at.scratch);
  }

  // Round and arrange vector t.
  void take(const rarefy_matrix& m, const Int8Kernels& k, const float* from, const float* given,
            int64_t t, int thread) const {
    int8_t* mine = codes + thread * at.stride;
    int32_t* mine_sums = sums + t * at.stride;
    float* scales = nullptr;
    if (grouped) {
      scales = blocks + t * int8_blocks(at.stride);
      quantize_groups(from, m.columns, mine, scales, int8_blocks(at.stride));
      scale[t] = 1.0f;
    } else {
      scale[t] = quantize(from, m.columns, given, mine, totals + t);
    }
    k.arrange(m, mine, x + t * at.stride, mine_sums, at.stride);
    add_groups(m, mine, scales, mine_sums, at.stride);
  }

  // The product of `wanted` vectors from number t on; y is where the first of them goes.
  Int8Product product(const rarefy_matrix& m, int64_t t, int64_t wanted, float* y) const {
    return {&m, x + t * at.stride, sums + t * at.stride, totals + t, scale + t,
            grouped ? blocks + t * int8_blocks(at.stride) : nullptr, at.stride, together(wanted), y,
            wanted};
  }
};

bool sound8(const rarefy_matrix& m, const float* input_scale, int64_t input_group) {
  if (!sound(m) || m.columns > kColumns) return false;
  return input_group == 0 || (input_group == kInputGroup && input_scale == nullptr);
}

}  // namespace

int64_t int8_scratch(const rarefy_matrix& m) {
  // Of four rows: scales and zero points, of groups and of blocks of at least 16 columns.
  return 4 * (2 * round_up(groups_of(m) + 4, 16) + round_up(m.columns, 128) / 8 + 16);
}

int matvec_int8(const rarefy_matrix& m, const float* x, const float* input_scale,
                int64_t input_group, float* y, int64_t vectors, Pool& pool, int threads) {
  if (!sound8(m, input_scale, input_group)) return RAREFY_UNSUPPORTED;
  static thread_local Scratch memory;
  const Int8Kernels& k = kernels(m, input_group, vectors);
  threads = std::max(1, threads);
  const int64_t most = round_up(std::min(vectors, kAtOnce), kTogether);
  const Layout at(m, most, threads);
  const Prepared ready(at, memory.take(at.end), input_group);
  const int64_t size = rows_per_part(m, threads);
  for (int64_t first = 0; first < vectors; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, vectors - first);
    pool.each(count < kTogether ? 1 : threads, count, [&](int64_t t, int thread) {
      ready.take(m, k, x + (first + t) * m.columns, input_scale, t, thread);
    });
    pool.each(threads, ceil_div(m.rows, size), [&](int64_t part, int thread) {
      const int64_t row0 = part * size, row1 = std::min(m.rows, row0 + size);
      for (int64_t t = 0; t < count; t += kTogether) {
        const int64_t wanted = std::min<int64_t>(kTogether, count - t);
        const Int8Product p = ready.product(m, t, wanted, y + (first + t) * m.rows);
        k.product(p, row0, row1, ready.scratch + thread * at.own);
      }
    });
  }
  return RAREFY_DONE;
}

int Rounded::product(const rarefy_matrix& m, const float* x, const float* input_scale,
                     int64_t input_group, float* y, int64_t row0, int64_t row1) {
  if (!sound8(m, input_scale, input_group)) return RAREFY_UNSUPPORTED;
  const Int8Kernels& k = kernels(m, input_group, 1);
  const Layout at(m, kTogether, 1);
  const Prepared ready(at, memory_.take(at.end), input_group);
  if (from_ != x || given_ != input_scale || bits_ != m.bits || columns_ != m.columns ||
      group_ != m.group || input_group_ != input_group || zero_steps_ != zero_steps(m)) {
    ready.take(m, k, x, input_scale, 0, 0);
    from_ = x;
    given_ = input_scale;
    bits_ = m.bits;
    columns_ = m.columns;
    group_ = m.group;
    input_group_ = input_group;
    zero_steps_ = zero_steps(m);
  }
  k.product(ready.product(m, 0, 1, y - row0), row0, row1, ready.scratch);
  return RAREFY_DONE;
}

}  // namespace rarefy
