// The C interface, and which function each kind of matrix goes to.

#include <new>

#include "blocked.h"
#include "dense.h"
#include "integer.h"
#include "integer8.h"
#include "lut.h"
#include "matrix.h"
#include "pool.h"
#include "sparse.h"

namespace rarefy {

int matvec(const rarefy_matrix& matrix, const float* x, float* y, int64_t vectors, Pool& pool,
           int threads) {
  switch (matrix.kind) {
    case RAREFY_F32:
    case RAREFY_F16:
    case RAREFY_BF16:
      return matvec_dense(matrix, x, y, vectors, pool, threads);
    case RAREFY_INT:
      return matvec_int(matrix, x, y, vectors, pool, threads);
    case RAREFY_BCQ:
      return lut_matvec(matrix, x, y, vectors, pool, threads);
    case RAREFY_BITMASK:
    case RAREFY_TWO_FOUR:
      return sparse_matvec(matrix, x, y, vectors, pool, threads);
    default:
      return RAREFY_UNSUPPORTED;
  }
}

int decode(const rarefy_matrix& matrix, int64_t row0, int64_t row1, float* out, Pool& pool,
           int threads) {
  switch (matrix.kind) {
    case RAREFY_F32:
    case RAREFY_F16:
    case RAREFY_BF16:
      return decode_dense(matrix, row0, row1, out, pool, threads);
    case RAREFY_INT:
      return decode_int(matrix, row0, row1, out, pool, threads);
    case RAREFY_BCQ:
      return lut_decode(matrix, row0, row1, out, pool, threads);
    case RAREFY_BITMASK:
    case RAREFY_TWO_FOUR:
      return sparse_decode(matrix, row0, row1, out, pool, threads);
    default:
      return RAREFY_UNSUPPORTED;
  }
}

int decode_rows(const rarefy_matrix& matrix, const int64_t* rows, int64_t count, float* out,
                Pool& pool, int threads) {
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] < 0 || rows[i] >= matrix.rows) return RAREFY_BAD_ARGUMENT;
  }
  return matrix.kind == RAREFY_INT ? decode_int_rows(matrix, rows, count, out, pool, threads)
                                   : static_cast<int>(RAREFY_UNSUPPORTED);
}

namespace {

// Exceptions must not leave the library: its callers are not C++.
template <class F>
int guarded(const rarefy_matrix* matrix, F&& f) {
  if (matrix == nullptr) return RAREFY_BAD_ARGUMENT;
  try {
    return f(*matrix, Pool::shared());
  } catch (const std::bad_alloc&) {
    return RAREFY_NO_MEMORY;
  }
}

}  // namespace
}  // namespace rarefy

using rarefy::guarded;
using rarefy::Pool;

extern "C" void rarefy_borrow(void (*parallel)(void (*)(void*), void*, unsigned, unsigned)) {
  Pool::borrow(parallel);
}

extern "C" int rarefy_matvec(const rarefy_matrix* matrix, const float* x, float* y,
                             int64_t vectors, int threads) {
  return guarded(matrix, [&](const rarefy_matrix& m, Pool& pool) {
    return rarefy::matvec(m, x, y, vectors, pool, threads);
  });
}

extern "C" int rarefy_matmul(const rarefy_matrix* matrix, const float* x, float* y,
                             int64_t vectors, int threads) {
  return guarded(matrix, [&](const rarefy_matrix& m, Pool& pool) {
    return rarefy::matmul(m, x, y, vectors, pool, threads);
  });
}

extern "C" int rarefy_matvec_int8(const rarefy_matrix* matrix, const float* x,
                                  const float* input_scale, int64_t input_group, float* y,
                                  int64_t vectors, int threads) {
  return guarded(matrix, [&](const rarefy_matrix& m, Pool& pool) {
    return rarefy::matvec_int8(m, x, input_scale, input_group, y, vectors, pool, threads);
  });
}

extern "C" int rarefy_decode(const rarefy_matrix* matrix, int64_t row0, int64_t row1, float* out,
                             int threads) {
  return guarded(matrix, [&](const rarefy_matrix& m, Pool& pool) {
    if (row0 < 0 || row0 > row1 || row1 > m.rows) return static_cast<int>(RAREFY_BAD_ARGUMENT);
    return rarefy::decode(m, row0, row1, out, pool, threads);
  });
}

extern "C" int rarefy_decode_rows(const rarefy_matrix* matrix, const int64_t* rows, int64_t count,
                                  float* out, int threads) {
  return guarded(matrix, [&](const rarefy_matrix& m, Pool& pool) {
    return rarefy::decode_rows(m, rows, count, out, pool, threads);
  });
}
