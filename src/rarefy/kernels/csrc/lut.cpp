// Cuts products with binary codings into parts for the threads.

#include "lut.h"

#include <algorithm>
#include <numeric>

#include "dispatch.h"
#include "pool.h"
#include "scratch.h"

namespace rarefy {
namespace {

constexpr int64_t kPart = 64;  // rows handed to a thread at a time, whole blocks of every level

const LutTable& lut() {
#if defined(RAREFY_X86)
  return pick(lut_portable(), lut_avx2(), lut_avx512());
#else
  return *lut_portable();
#endif
}

bool sound(const rarefy_matrix& m) {
  return m.kind == RAREFY_BCQ && m.bits >= 1 && m.bits <= 8 && m.rows >= 0 && m.columns > 0 &&
         (m.group % 8 == 0 || groups_of(m) == 1) && m.words_per_row * 32 >= m.columns && m.codes &&
         m.scales;
}

// Memory of a call: tables and group sums of its vectors, and each thread's own.
struct Workspace {
  float *tables, *sums, *own;
  int64_t stride;  // from one thread's part to the next

  Workspace(const rarefy_matrix& m, int64_t vectors, int threads) {
    static thread_local Scratch memory;
    const int64_t size = vectors * lut().table_size(m.columns);
    const int64_t groups = round_up(vectors * groups_of(m), 16);
    stride = round_up(lut_scratch(m), 16);
    tables = static_cast<float*>(
        memory.take((size + groups + threads * stride) * static_cast<int64_t>(sizeof(float))));
    sums = tables + size;
    own = sums + groups;
  }

  LutJob job(const rarefy_matrix& m, const float* x, int64_t vectors) const {
    const int64_t n = m.columns, group = lut_group(m);
    float* sum = sums;
    for (int64_t t = 0; t < vectors; ++t) {
      const float* vector = x + t * n;
      lut().build(vector, n, tables + t * lut().table_size(n));
      for (int64_t j = 0; j < n; j += group) {
        const float* past = vector + std::min(n, j + group);
        *sum++ = static_cast<float>(std::accumulate(vector + j, past, 0.0));
      }
    }
    return {&m, tables, sums, vectors, nullptr, m.rows, 0};
  }
};

}  // namespace

int lut_matvec(const rarefy_matrix& matrix, const float* x, float* y, int64_t vectors, Pool& pool,
               int threads) {
  if (!sound(matrix)) return RAREFY_UNSUPPORTED;
  const int64_t m = matrix.rows;
  threads = std::max(1, threads);
  const Workspace work(matrix, std::min(vectors, kLutVectors), threads);
  for (int64_t t = 0; t < vectors; t += kLutVectors) {
    LutJob job = work.job(matrix, x + t * matrix.columns, std::min(kLutVectors, vectors - t));
    job.y = y + t * m;
    pool.each(threads, ceil_div(m, kPart), [&](int64_t part, int thread) {
      const int64_t past = std::min(m, (part + 1) * kPart);
      lut().product(job, part * kPart, past, work.own + thread * work.stride);
    });
  }
  return RAREFY_DONE;
}

int lut_matvec_rows(const rarefy_matrix& matrix, const float* x, float* y, int64_t row0,
                    int64_t row1) {
  if (!sound(matrix)) return RAREFY_UNSUPPORTED;
  const Workspace work(matrix, 1, 1);
  LutJob job = work.job(matrix, x, 1);
  job.y = y;
  job.first = row0;
  lut().product(job, row0, row1, work.own);
  return RAREFY_DONE;
}

int lut_decode(const rarefy_matrix& matrix, int64_t row0, int64_t row1, float* out, Pool& pool,
               int threads) {
  if (!sound(matrix)) return RAREFY_UNSUPPORTED;
  const int64_t part = 16;
  pool.each(threads, ceil_div(row1 - row0, part), [&](int64_t index, int) {
    const int64_t last = std::min(row1, row0 + (index + 1) * part);
    for (int64_t row = row0 + index * part; row < last; ++row) {
      lut().decode(matrix, row, out + (row - row0) * matrix.columns);
    }
  });
  return RAREFY_DONE;
}

}  // namespace rarefy
