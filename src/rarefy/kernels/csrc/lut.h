// Products with binary codings by table look-up, after LUT-GEMM (Park et al., ICLR 2024): for a few
// inputs at a time all their signed sums are computed once, and every row of every plane picks the
// one that its signs ask for. No weight is formed.
//
// Matrices (RAREFY_BCQ): w = beta + sum_i alpha_i b_i, b_i = +1 where a plane's bit is set, else -1.
//   codes   [m, bits, words_per_row] 32-bit words, LSB first, columns padded to whole words
//   scales  [m, G, bits] in scale_type
//   zeros   beta [m, G] in scale_type, or null
//   extra   beta as int16 multiples of the group's last scale [m, G], or null
//   group   a multiple of 8; 0 or n: one group a row
#pragma once

#include "convert.h"
#include "matrix.h"

namespace rarefy {

// y[t, m] = W x[t, n] for t < vectors.
int lut_matvec(const rarefy_matrix& matrix, const float* x, float* y, int64_t vectors, Pool& pool,
               int threads);

// y[0 .. row1 - row0] = rows row0 .. row1 of W x, on the calling thread.
int lut_matvec_rows(const rarefy_matrix& matrix, const float* x, float* y, int64_t row0,
                    int64_t row1);

// out[row1 - row0, n] = those rows as float32, added up in the order of the planes.
int lut_decode(const rarefy_matrix& matrix, int64_t row0, int64_t row1, float* out, Pool& pool,
               int threads);

// What every thread of a product reads, and where its results go.
struct LutJob {
  const rarefy_matrix* matrix;
  const float* tables;   // [vectors, table_size(n)]
  const float* sums;     // [vectors, G]: of the inputs of each group, what beta multiplies
  int64_t vectors;       // at most kLutVectors
  float* y;              // row r of vector t goes to y[t * stride + r - first]
  int64_t stride, first;
};

constexpr int64_t kLutVectors = 8;
constexpr int64_t kLutLanes = 16;  // rows of a block, at most
constexpr int64_t kLutTile = 64;   // words of a plane that are turned at a time

// One way to look up.
struct LutTable {
  int64_t (*table_size)(int64_t columns);                            // floats of one vector
  void (*build)(const float* x, int64_t columns, float* tables);     // of one vector
  // `scratch`: lut_scratch floats for this thread alone.
  void (*product)(const LutJob& job, int64_t row0, int64_t row1, float* scratch);
  void (*decode)(const rarefy_matrix& matrix, int64_t row, float* out);
};

namespace {

inline int64_t lut_group(const rarefy_matrix& m) {
  return groups_of(m) > 1 ? m.group : m.columns;
}

// Codes of a tile, then scales, then offsets, of a block of rows.
inline int64_t lut_scratch(const rarefy_matrix& m) {
  return kLutLanes * (kLutTile * m.bits + groups_of(m) * (m.bits + 1));
}

inline float float_at(const void* array, int32_t type, int64_t index) {
  if (type == RAREFY_SCALE_F32) return load<float>(static_cast<const float*>(array) + index);
  const uint16_t bits = load<uint16_t>(static_cast<const uint16_t*>(array) + index);
  return type == RAREFY_SCALE_F16 ? from_f16(bits) : from_bf16(bits);
}

// beta of a group, counted over all rows, whose last scale is known.
inline float lut_offset(const rarefy_matrix& m, int64_t index, float last) {
  if (m.extra) return load<int16_t>(static_cast<const int16_t*>(m.extra) + index) * last;
  return m.zeros ? float_at(m.zeros, m.scale_type, index) : 0.0f;
}

}  // namespace

const LutTable* lut_portable();
const LutTable* lut_avx2();    // null where not compiled
const LutTable* lut_avx512();  // null where not compiled

}  // namespace rarefy
