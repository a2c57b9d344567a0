#include "blocked.h"

#include <algorithm>
#include <cstring>

#include "convert.h"
#include "dispatch.h"
#include "pool.h"
#include "scratch.h"

namespace rarefy {
namespace {

constexpr int64_t kVectors = 512;     // that are packed together
constexpr int64_t kSquare = 16;
constexpr int64_t kDecoded = 1 << 20; // bytes of decoded rows, about half of a second-level cache

const BlockedKernels* kernels() {
#if defined(RAREFY_X86)
  switch (level()) {
    case Level::avx512:
      return &blocked_avx512;
    case Level::avx2:
      return &blocked_avx2;
    default:
      return nullptr;
  }
#else
  return nullptr;
#endif
}

// One call's sizes and memory.
struct Plan {
  const rarefy_matrix& matrix;
  const BlockedKernels& kernel;
  const float* x;
  float* y;
  int64_t vectors, panels, columns, rows, stride;  // stride: vectors with those that fill a panel
  float* packed;
  Pool& pool;

  int64_t block(int64_t first, int64_t panel) const {
    return (first * panels + panel * std::min(kDepth, columns - first)) * kernel.vectors;
  }

  // Panel p of every block of columns: [columns of the block, vectors of the panel].
  void pack(int64_t panel) const {
    const int64_t wide = kernel.vectors, from = panel * wide;
    const int64_t some = std::min(wide, vectors - from);
    for (int64_t first = 0; first < columns; first += kDepth) {
      float* to = packed + block(first, panel);
      const int64_t depth = std::min(kDepth, columns - first);
      for (int64_t k = 0; k < depth; ++k, to += wide) {
        const float* in = x + from * columns + first + k;
        for (int64_t t = 0; t < some; ++t) to[t] = in[t * columns];
        std::fill(to + some, to + wide, 0.0f);
      }
    }
  }

  // Rows row0 .. row1 of the product. own: decoded rows, sums and a tile.
  void part(int64_t row0, int64_t row1, float* own) const {
    const int64_t count = row1 - row0, tile_rows = kernel.rows;
    float* sums = own + rows * columns;
    float* tile = sums + round_up(rows, tile_rows) * stride;
    decode(matrix, row0, row1, own, pool, 1);
    for (int64_t first = 0; first < columns; first += kDepth) {
      const int64_t depth = std::min(kDepth, columns - first);
      const int64_t after = first + kDepth < columns ? first + kDepth : 0;
      const float* next = packed + block(after, 0);
      const float* const end = next + panels * std::min(kDepth, columns - after) * kernel.vectors;
      for (int64_t r = 0; r < count; r += tile_rows) {
        for (int64_t i = 0; i < tile_rows; ++i) {
          float* to = tile + i * kTileStride;
          const float* from = own + (r + i) * columns + first;
          if (r + i < count) std::memcpy(to, from, depth * sizeof(float));
          else std::memset(to, 0, depth * sizeof(float));
        }
        for (int64_t p = 0; p < panels; ++p) {
          const float* panel = packed + block(first, p);
          kernel.tile(tile, panel, depth, sums + r * stride + p * kernel.vectors, stride,
                      first == 0, next < end ? next : panel);
          next += depth * kernel.vectors / 2;
        }
      }
    }
    // By squares, so that lines of both sides stay in the cache until they are done with.
    for (int64_t r0 = 0; r0 < count; r0 += kSquare) {
      const int64_t r1 = std::min(count, r0 + kSquare);
      for (int64_t t0 = 0; t0 < vectors; t0 += kSquare) {
        const int64_t t1 = std::min(vectors, t0 + kSquare);
        for (int64_t t = t0; t < t1; ++t) {
          float* to = y + t * matrix.rows + row0;
          for (int64_t r = r0; r < r1; ++r) to[r] = sums[r * stride + t];
        }
      }
    }
  }
};

}  // namespace

int matmul(const rarefy_matrix& matrix, const float* x, float* y, int64_t vectors, Pool& pool,
           int threads) {
  const BlockedKernels* kernel = kernels();
  if (kernel == nullptr || matrix.columns < 1 || matrix.rows < 1) return RAREFY_UNSUPPORTED;
  float none;
  const int known = decode(matrix, 0, 0, &none, pool, 1);
  if (known != RAREFY_DONE) return known;
  static thread_local Scratch memory;
  threads = std::max(1, threads);
  const int64_t n = matrix.columns;
  const int64_t large = std::max<int64_t>(kernel->rows, kDecoded / 4 / n);
  const int64_t parts = round_up(ceil_div(matrix.rows, large), threads);
  const int64_t rows = round_up(ceil_div(matrix.rows, parts), kernel->rows);
  for (int64_t first = 0; first < vectors; first += kVectors) {
    const int64_t count = std::min(kVectors, vectors - first);
    const int64_t panels = ceil_div(count, kernel->vectors), stride = panels * kernel->vectors;
    const int64_t own = round_up(rows * (n + stride) + kernel->rows * kTileStride, 16);
    float* packed = static_cast<float*>(memory.take((stride * n + threads * own) * 4));
    const Plan plan{matrix, *kernel, x + first * n, y + first * matrix.rows, count, panels, n,
                    rows,   stride,  packed,        pool};
    pool.each(threads, panels, [&](int64_t panel, int) { plan.pack(panel); });
    float* scratch = packed + stride * n;
    pool.each(threads, ceil_div(matrix.rows, rows), [&](int64_t part, int thread) {
      const int64_t row0 = part * rows;
      plan.part(row0, std::min(matrix.rows, row0 + rows), scratch + thread * own);
    });
  }
  return RAREFY_DONE;
}

}  // namespace rarefy
