#include "rowwise.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "convert.h"
#include "dense.h"
#include "dispatch.h"
#include "integer.h"
#include "lut.h"
#include "pool.h"
#include "single.h"
#include "sparse.h"

namespace rarefy {
namespace {

#if defined(RAREFY_X86)
const IntKernels& integers() { return pick(&int_portable, &int_avx2, &int_avx512); }
const DenseKernels& dense() { return pick(&dense_portable, &dense_avx2, &dense_avx512); }
#else
const IntKernels& integers() { return int_portable; }
const DenseKernels& dense() { return dense_portable; }
#endif

float scale_at(const rarefy_matrix& m, int64_t row, int64_t at) {
  if (m.scale_type == RAREFY_SCALE_F32) return static_cast<const float*>(m.scales)[at];
  if (m.scale_type == RAREFY_SCALE_U8) return m.units[row] * static_cast<const uint8_t*>(m.scales)[at];
  const uint16_t half = static_cast<const uint16_t*>(m.scales)[at];
  return m.scale_type == RAREFY_SCALE_F16 ? from_f16(half) : from_bf16(half);
}

// One weight of an 8-bit matrix.
float weight_at(const rarefy_matrix& m, int64_t row, int64_t column) {
  const int64_t groups = groups_of(m), g = groups > 1 ? column / m.group : 0;
  int zero = 128;
  if (!m.symmetric && m.zeros != nullptr) {
    const uint32_t word = static_cast<const uint32_t*>(m.zeros)[row / 4 * groups + g];
    zero = static_cast<int>(word >> row % 4 * 8 & 255);
  }
  const float units = static_cast<float>(row_codes(m, row)[column] - zero);
  return units * scale_at(m, row, row * groups + g);
}

float* room(Scratch& scratch, int64_t floats) {
  return static_cast<float*>(scratch.take(floats * static_cast<int64_t>(sizeof(float))));
}

}  // namespace

const float* RowWorker::arrange(const rarefy_matrix& matrix, const float* x) {
  const int64_t stride = round_up(matrix.columns, 64);
  const bool single = single_kernels().suits(matrix);
  float* out = room(arranged_, single ? ceil_div(single_bytes(matrix), 4) : stride);
  if (from_ == x && bits_ == matrix.bits && columns_ == matrix.columns && group_ == matrix.group &&
      zero_steps_ == zero_steps(matrix)) {
    return out;
  }
  if (single) {
    single_ = single_kernels().arrange(matrix, x, out);
  } else {
    integers().arrange(matrix, x, out, stride);
  }
  from_ = x;
  bits_ = matrix.bits;
  columns_ = matrix.columns;
  group_ = matrix.group;
  zero_steps_ = zero_steps(matrix);
  return out;
}

int RowWorker::product(const rarefy_matrix& matrix, const float* x, float* y, int64_t row0,
                       int64_t row1) {
  switch (matrix.kind) {
    case RAREFY_F32:
    case RAREFY_F16:
    case RAREFY_BF16:
      dense().product(matrix, x, y - row0, 1, row0, row1);
      return RAREFY_DONE;
    case RAREFY_INT: {
      if (!sound(matrix)) return RAREFY_UNSUPPORTED;
      float* scratch = room(scratch_, int_scratch(matrix));
      const float* arranged = arrange(matrix, x);
      if (single_kernels().suits(matrix)) {
        SingleProduct job = single_;
        job.matrix = &matrix;
        job.y = y - row0;
        single_kernels().product(job, row0, row1, scratch);
      } else {
        const int64_t stride = round_up(matrix.columns, 64);
        const IntProduct job{&matrix, arranged, stride, 1, y - row0, 1};
        integers().product(job, row0, row1, scratch);
      }
      return RAREFY_DONE;
    }
    case RAREFY_BCQ:
      return lut_matvec_rows(matrix, x, y, row0, row1);
    case RAREFY_BITMASK:
    case RAREFY_TWO_FOUR:
      return sparse_matvec_rows(matrix, x, y, row0, row1);
    default:
      return RAREFY_UNSUPPORTED;
  }
}

int RowWorker::product_mixed(const rarefy_matrix& matrix, const float* x, float outlier, float* y,
                             int64_t row0, int64_t row1) {
  if (matrix.kind != RAREFY_INT || matrix.bits != 8) return RAREFY_UNSUPPORTED;
  float* calm = room(calm_, matrix.columns);
  if (mixed_ != x || outlier_ != outlier) {
    apart_.clear();
    for (int64_t j = 0; j < matrix.columns; ++j) {
      const bool large = std::abs(x[j]) >= outlier;
      calm[j] = large ? 0.0f : x[j];
      if (large) apart_.push_back(j);
    }
    rounded_.renew();
    mixed_ = x;
    outlier_ = outlier;
  }
  const int status = rounded_.product(matrix, calm, nullptr, 0, y, row0, row1);
  if (status != RAREFY_DONE) return status;
  for (int64_t row = row0; row < row1; ++row) {
    float sum = 0.0f;
    for (const int64_t j : apart_) sum += x[j] * weight_at(matrix, row, j);
    y[row - row0] += sum;
  }
  return RAREFY_DONE;
}

int RowWorker::decode(const rarefy_matrix& matrix, int64_t row0, int64_t row1, float* out) {
  switch (matrix.kind) {
    case RAREFY_F32:
    case RAREFY_F16:
    case RAREFY_BF16:
      dense().decode(matrix, row0, row1, out);
      return RAREFY_DONE;
    case RAREFY_INT:
      integers().decode(matrix, row0, row1, out, room(scratch_, int_scratch(matrix)));
      return RAREFY_DONE;
    case RAREFY_BCQ:
      return lut_decode(matrix, row0, row1, out, Pool::shared(), 1);
    case RAREFY_BITMASK:
    case RAREFY_TWO_FOUR:
      return sparse_decode(matrix, row0, row1, out, Pool::shared(), 1);
    default:
      return RAREFY_UNSUPPORTED;
  }
}

bool has_rows(const rarefy_matrix& matrix, bool rounded) {
  const std::vector<float> x(static_cast<std::size_t>(matrix.columns));
  float y = 0.0f;
  const int64_t row1 = std::min<int64_t>(1, matrix.rows);
  RowWorker worker;
  const int status = rounded ? worker.product_int8(matrix, x.data(), nullptr, 0, &y, 0, row1)
                             : worker.product(matrix, x.data(), &y, 0, row1);
  return status == RAREFY_DONE;
}

}  // namespace rarefy
