// Cuts products with grouped integers into parts for the threads.

#include "integer.h"

#include <algorithm>

#include "convert.h"
#include "dispatch.h"
#include "pool.h"
#include "scratch.h"
#include "single.h"

namespace rarefy {
namespace {

constexpr int64_t kAtOnce = 64;  // vectors that are arranged together

const IntKernels& kernels() {
#if defined(RAREFY_X86)
  return pick(&int_portable, &int_avx2, &int_avx512);
#else
  return pick<IntKernels>(&int_portable, nullptr, nullptr);
#endif
}

bool none(const rarefy_matrix&) { return false; }

}  // namespace

const SingleKernels& single_kernels() {
  static const SingleKernels portable = {none, nullptr, nullptr};
#if defined(RAREFY_X86)
  return pick(&portable, &single_avx2, &single_avx512);
#else
  return portable;
#endif
}

int64_t single_bytes(const rarefy_matrix& m) {
  return 5 * m.columns + 4 * (round_up(groups_of(m), 16) + m.columns / kStep + 8);
}

int64_t int_scratch(const rarefy_matrix& m) {
  // Scales and zero points of four rows and one decoded row, or scales of the half steps of four rows.
  const int64_t row = round_up(m.columns, 64), parts = ceil_div(m.columns, kStep / 2);
  return std::max(8 * round_up(groups_of(m), 16) + row, 4 * (round_up(parts, 8) + 8));
}

bool sound(const rarefy_matrix& m) {
  return m.kind == RAREFY_INT && m.bits >= 1 && m.bits <= 8 && m.columns > 0 &&
         m.words_per_row * 32 >= m.columns * m.bits && m.bits <= zero_bits_of(m) &&
         zero_bits_of(m) <= 8 && (m.scale_type != RAREFY_SCALE_U8 || m.units != nullptr);
}

int together(int64_t vectors) {
  return vectors > 4 ? kTogether : vectors > 2 ? 4 : static_cast<int>(vectors);
}

int64_t rows_per_part(const rarefy_matrix& m, int threads) {
  constexpr int64_t kBytes = 1 << 20, kRows = 4;
  const int64_t large = kBytes / std::max<int64_t>(1, m.words_per_row * 4);
  const int64_t fair = ceil_div(m.rows, 4 * std::max(1, threads));
  return round_up(std::max<int64_t>(1, std::min(large, fair)), kRows);
}

namespace {

void matvec_single(const SingleKernels& k, const rarefy_matrix& m, const float* x, float* y,
                   Pool& pool, int threads) {
  static thread_local Scratch memory;
  const int64_t own = round_up(int_scratch(m), 16);
  float* scratch = static_cast<float*>(memory.take(threads * own * 4 + single_bytes(m)));
  SingleProduct p = k.arrange(m, x, scratch + threads * own);
  p.y = y;
  const int64_t size = rows_per_part(m, threads);
  pool.each(threads, ceil_div(m.rows, size), [&](int64_t part, int thread) {
    const int64_t row0 = part * size, row1 = std::min(m.rows, row0 + size);
    k.product(p, row0, row1, scratch + thread * own);
  });
}

}  // namespace

int matvec_int(const rarefy_matrix& m, const float* x, float* y, int64_t vectors, Pool& pool,
               int threads) {
  if (!sound(m)) return RAREFY_UNSUPPORTED;
  if (vectors == 1 && single_kernels().suits(m)) {
    matvec_single(single_kernels(), m, x, y, pool, std::max(1, threads));
    return RAREFY_DONE;
  }
  static thread_local Scratch memory;
  const IntKernels& k = kernels();
  const int64_t stride = round_up(m.columns, 64), own = round_up(int_scratch(m), 16);
  const int64_t most = round_up(std::min(vectors, kAtOnce), kTogether);
  threads = std::max(1, threads);
  float* arranged = static_cast<float*>(memory.take((most * stride + threads * own) * 4));
  float* scratch = arranged + most * stride;
  const int64_t size = rows_per_part(m, threads);
  for (int64_t first = 0; first < vectors; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, vectors - first);
    for (int64_t t = 0; t < count; ++t) {
      k.arrange(m, x + (first + t) * m.columns, arranged + t * stride, stride);
    }
    std::fill(arranged + count * stride, arranged + round_up(count, kTogether) * stride, 0.0f);
    pool.each(threads, ceil_div(m.rows, size), [&](int64_t part, int thread) {
      const int64_t row0 = part * size, row1 = std::min(m.rows, row0 + size);
      for (int64_t t = 0; t < count; t += kTogether) {
        const int64_t wanted = std::min<int64_t>(kTogether, count - t);
        const IntProduct p{&m, arranged + t * stride, stride, together(wanted),
                           y + (first + t) * m.rows, wanted};
        k.product(p, row0, row1, scratch + thread * own);
      }
    });
  }
  return RAREFY_DONE;
}

int decode_int(const rarefy_matrix& m, int64_t row0, int64_t row1, float* out, Pool& pool,
               int threads) {
  if (!sound(m)) return RAREFY_UNSUPPORTED;
  static thread_local Scratch memory;
  const IntKernels& k = kernels();
  threads = std::max(1, threads);
  const int64_t own = round_up(int_scratch(m), 16), size = rows_per_part(m, threads);
  float* scratch = static_cast<float*>(memory.take(threads * own * 4));
  pool.each(threads, ceil_div(row1 - row0, size), [&](int64_t part, int thread) {
    const int64_t from = row0 + part * size, to = std::min(row1, from + size);
    k.decode(m, from, to, out + part * size * m.columns, scratch + thread * own);
  });
  return RAREFY_DONE;
}

int decode_int_rows(const rarefy_matrix& m, const int64_t* rows, int64_t count, float* out,
                    Pool& pool, int threads) {
  if (!sound(m)) return RAREFY_UNSUPPORTED;
  static thread_local Scratch memory;
  const IntKernels& k = kernels();
  threads = count < 16 ? 1 : std::max(1, threads);
  const int64_t own = round_up(int_scratch(m), 16);
  float* scratch = static_cast<float*>(memory.take(threads * own * 4));
  pool.each(threads, count, [&](int64_t i, int thread) {
    k.decode(m, rows[i], rows[i] + 1, out + i * m.columns, scratch + thread * own);
  });
  return RAREFY_DONE;
}

}  // namespace rarefy
