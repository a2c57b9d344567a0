// Cuts dense products into parts for the threads.

#include "dense.h"

#include <algorithm>

#include "convert.h"
#include "dispatch.h"
#include "pool.h"

namespace rarefy {
namespace {

const DenseKernels& kernels() {
#if defined(RAREFY_X86)
  return pick(&dense_portable, &dense_avx2, &dense_avx512);
#else
  return pick<DenseKernels>(&dense_portable, nullptr, nullptr);
#endif
}

int64_t rows_at_once(const rarefy_matrix& m, int64_t rows, int threads) {
  const int64_t width = m.kind == RAREFY_F32 ? 4 : 2;
  const int64_t large = (1 << 20) / std::max<int64_t>(1, m.columns * width);
  const int64_t fair = ceil_div(rows, 4 * std::max(1, threads));
  return round_up(std::max<int64_t>(1, std::min(large, fair)), 4);
}

}  // namespace

int matvec_dense(const rarefy_matrix& m, const float* x, float* y, int64_t vectors, Pool& pool,
                 int threads) {
  const DenseKernels& k = kernels();
  const int64_t size = rows_at_once(m, m.rows, threads);
  pool.each(threads, ceil_div(m.rows, size), [&](int64_t part, int) {
    k.product(m, x, y, vectors, part * size, std::min(m.rows, (part + 1) * size));
  });
  return RAREFY_DONE;
}

int decode_dense(const rarefy_matrix& m, int64_t row0, int64_t row1, float* out, Pool& pool,
                 int threads) {
  const DenseKernels& k = kernels();
  const int64_t size = rows_at_once(m, row1 - row0, threads);
  pool.each(threads, ceil_div(row1 - row0, size), [&](int64_t part, int) {
    const int64_t from = row0 + part * size, to = std::min(row1, from + size);
    k.decode(m, from, to, out + part * size * m.columns);
  });
  return RAREFY_DONE;
}

}  // namespace rarefy
