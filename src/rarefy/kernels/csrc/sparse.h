// Products with matrices whose zeros are not stored.
//
// Values, of the kept weights row by row without gaps (rarefy_matrix.codes):
//   bits 0      floating numbers in scale_type; scales and zeros unused
//   bits 2..8   an LSB-first bit stream of codes, w = scale * (code - zero); scales, zeros and
//               symmetric as for RAREFY_INT
// Places (rarefy_matrix.extra, a rarefy_places):
//   RAREFY_BITMASK   one bit a weight, rows padded to whole 32-bit words
//   RAREFY_TWO_FOUR  two of every four columns: two bits for each kept weight, its place among the
//                    four, in rising order and without gaps
#pragma once

#include "convert.h"
#include "matrix.h"

extern "C" {

struct rarefy_places {
  const void* stream;     // mask [m, words_per_row] or places [ceil(m n / 32)], 32-bit words
  const int64_t* starts;  // bitmask: number of kept weights above each row, and in all, [m + 1]
};
}

namespace rarefy {

// y[t, m] = W x[t, n] for t < vectors.
int sparse_matvec(const rarefy_matrix& matrix, const float* x, float* y, int64_t vectors,
                  Pool& pool, int threads);

// y[0 .. row1 - row0] = rows row0 .. row1 of W x, on the calling thread.
int sparse_matvec_rows(const rarefy_matrix& matrix, const float* x, float* y, int64_t row0,
                       int64_t row1);

// out[row1 - row0, n] = those rows as float32.
int sparse_decode(const rarefy_matrix& matrix, int64_t row0, int64_t row1, float* out, Pool& pool,
                  int threads);

constexpr int64_t kSparseVectors = 8;

struct SparseInput {
  const float* x;
  int64_t stride;   // floats from one vector to the next; zeros from the last column on
  int64_t vectors;  // at most kSparseVectors
};

// One row at a time. `scratch`: sparse_scratch floats for this thread alone.
struct SparseTable {
  // y[t * stride] = row . x[t * in.stride] for t < in.vectors.
  void (*product)(const rarefy_matrix& matrix, int64_t row, const SparseInput& in, float* y,
                  int64_t stride, float* scratch);
  void (*decode)(const rarefy_matrix& matrix, int64_t row, float* out, float* scratch);
};

namespace {

// Codes from number `at` on, of `total`.
struct CodeStream {
  const void* codes;
  int bits;
  int64_t at, total;

  // At least 57 bits from code `at + skipped` on; zeros behind the end of the last octet.
  uint64_t window(int64_t skipped = 0) const {
    const int64_t first = (at + skipped) * bits, left = (total * bits + 7) / 8 - first / 8;
    const auto* place = static_cast<const uint8_t*>(codes) + first / 8;
    uint64_t found = 0;
    if (left >= 8) {
      found = load<uint64_t>(place);
    } else {
      for (int64_t i = 0; i < left; ++i) found |= static_cast<uint64_t>(place[i]) << 8 * i;
    }
    return found >> first % 8;
  }

  // As many ones as a code has bits, in each octet.
  uint64_t ones() const { return 0x0101010101010101u * ((1u << bits) - 1); }
};

// A row's mask, scales and zero points.
inline int64_t sparse_scratch(const rarefy_matrix& m) {
  return ceil_div(m.columns, 32) + 2 + 2 * (m.bits ? groups_of(m) : 0);
}

}  // namespace

const SparseTable* sparse_portable();
const SparseTable* sparse_avx2();    // null where not compiled
const SparseTable* sparse_avx512();  // null where not compiled

}  // namespace rarefy
