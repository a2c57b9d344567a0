// Cuts products with sparse matrices into parts for the threads.

#include "sparse.h"

#include <algorithm>

#include "dispatch.h"
#include "pool.h"
#include "scratch.h"

namespace rarefy {
namespace {

constexpr int64_t kPart = 16;   // rows handed to a thread at a time
constexpr int64_t kReach = 16;  // lanes that a vector may have behind the last column

const SparseTable& sparse() {
#if defined(RAREFY_X86)
  return pick(sparse_portable(), sparse_avx2(), sparse_avx512());
#else
  return *sparse_portable();
#endif
}

bool sound(const rarefy_matrix& m) {
  const auto* places = static_cast<const rarefy_places*>(m.extra);
  if (!places || !places->stream || !m.codes || m.columns < 1) return false;
  if (m.bits && (m.bits < 2 || m.bits > 8 || !m.scales)) return false;
  if (m.kind == RAREFY_TWO_FOUR) return m.columns % 4 == 0;
  return m.kind == RAREFY_BITMASK && places->starts && m.words_per_row * 32 >= m.columns;
}

// Memory of a call: its vectors with zeros behind them, and each thread's own.
struct Workspace {
  float *inputs, *own;
  int64_t columns, stride, part;  // from one vector, and one thread's part, to the next

  Workspace(const rarefy_matrix& m, int64_t vectors, int threads)
      : columns(m.columns),
        stride(round_up(m.columns + kReach, 16)),
        part(round_up(sparse_scratch(m), 16)) {
    static thread_local Scratch memory;
    inputs = static_cast<float*>(memory.take((vectors * stride + threads * part) *
                                             static_cast<int64_t>(sizeof(float))));
    own = inputs + vectors * stride;
  }

  SparseInput take(const float* x, int64_t vectors) const {
    for (int64_t t = 0; t < vectors; ++t) {
      float* end = std::copy(x + t * columns, x + (t + 1) * columns, inputs + t * stride);
      std::fill(end, inputs + (t + 1) * stride, 0.0f);
    }
    return {inputs, stride, vectors};
  }
};

}  // namespace

int sparse_matvec(const rarefy_matrix& matrix, const float* x, float* y, int64_t vectors,
                  Pool& pool, int threads) {
  if (!sound(matrix)) return RAREFY_UNSUPPORTED;
  const int64_t m = matrix.rows;
  threads = std::max(1, threads);
  const Workspace work(matrix, std::min(vectors, kSparseVectors), threads);
  for (int64_t t = 0; t < vectors; t += kSparseVectors) {
    const int64_t count = std::min(kSparseVectors, vectors - t);
    const SparseInput in = work.take(x + t * matrix.columns, count);
    pool.each(threads, ceil_div(m, kPart), [&](int64_t part, int thread) {
      float* own = work.own + thread * work.part;
      for (int64_t row = part * kPart; row < std::min(m, (part + 1) * kPart); ++row) {
        sparse().product(matrix, row, in, y + t * m + row, m, own);
      }
    });
  }
  return RAREFY_DONE;
}

int sparse_matvec_rows(const rarefy_matrix& matrix, const float* x, float* y, int64_t row0,
                       int64_t row1) {
  if (!sound(matrix)) return RAREFY_UNSUPPORTED;
  const Workspace work(matrix, 1, 1);
  const SparseInput in = work.take(x, 1);
  for (int64_t row = row0; row < row1; ++row) {
    sparse().product(matrix, row, in, y + row - row0, 1, work.own);
  }
  return RAREFY_DONE;
}

int sparse_decode(const rarefy_matrix& matrix, int64_t row0, int64_t row1, float* out, Pool& pool,
                  int threads) {
  if (!sound(matrix)) return RAREFY_UNSUPPORTED;
  threads = std::max(1, threads);
  const Workspace work(matrix, 0, threads);
  pool.each(threads, ceil_div(row1 - row0, kPart), [&](int64_t part, int thread) {
    const int64_t last = std::min(row1, row0 + (part + 1) * kPart);
    for (int64_t row = row0 + part * kPart; row < last; ++row) {
      sparse().decode(matrix, row, out + (row - row0) * matrix.columns, work.own + thread * work.part);
    }
  });
  return RAREFY_DONE;
}

}  // namespace rarefy
