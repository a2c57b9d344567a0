// Products with many vectors: rows are decoded into a core's own cache and multiplied there.
//
//   x in panels: blocks of kDepth columns, in each of them panels of so many vectors as a tile has
//   for each block of rows, a thread's part:
//     decode them                                             in the second-level cache
//     for each block of columns, each tile of rows, each panel:
//       sums += rows of the tile x vectors of the panel       in registers
//
// Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 2008.
#pragma once

#include "matrix.h"

namespace rarefy {

constexpr int64_t kDepth = 256;  // columns at a time
// Floats between the rows of a tile, so that they do not share lines of a cache.
constexpr int64_t kTileStride = kDepth + 16;

struct BlockedKernels {
  int rows;     // of a tile
  int vectors;  // of a panel
  // sums[rows, stride] = (or +=, unless `first`) tile[rows, depth] panel[depth, vectors];
  // half as much of `next` as this panel has is fetched meanwhile.
  void (*tile)(const float* tile, const float* panel, int64_t depth, float* sums, int64_t stride,
               bool first, const float* next);
};

#if defined(RAREFY_X86)
extern const BlockedKernels blocked_avx2;
extern const BlockedKernels blocked_avx512;
#endif

// y[t, m] = x[t, n] W^T; RAREFY_UNSUPPORTED where there is no kernel for it.
int matmul(const rarefy_matrix& matrix, const float* x, float* y, int64_t vectors, Pool& pool,
           int threads);

}  // namespace rarefy
