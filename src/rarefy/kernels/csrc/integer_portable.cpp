// Any width of codes, any group, any processor: decode a row, then multiply.

#include "integer.h"
#include "stream.h"

namespace rarefy {
namespace {

void decode_row(const rarefy_matrix& m, int64_t row, float* out, float* scratch) {
  const int64_t groups = groups_of(m), group = groups > 1 ? m.group : m.columns;
  float* scale = scratch;
  float* zero = scratch + groups;
  row_scales(m, row, scale);
  row_zeros(m, row, zero);
  Stream stream(row_codes(m, row), m.bits);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = at_most(m.columns, (g + 1) * group);
    for (int64_t j = g * group; j < end; ++j) {
      out[j] = (static_cast<float>(stream.next()) - zero[g]) * scale[g];
    }
  }
}

void arrange(const rarefy_matrix& m, const float* x, float* out, int64_t stride) {
  std::memcpy(out, x, m.columns * sizeof(float));
  std::memset(out + m.columns, 0, (stride - m.columns) * sizeof(float));
}

// Eight partial sums, so that the order of additions leaves room for vector instructions.
float dot(const float* a, const float* b, int64_t count) {
  float sum[8] = {};
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    for (int k = 0; k < 8; ++k) sum[k] += a[j + k] * b[j + k];
  }
  for (; j < count; ++j) sum[0] += a[j] * b[j];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

void product(const IntProduct& p, int64_t row0, int64_t row1, float* scratch) {
  const rarefy_matrix& m = *p.matrix;
  float* weights = scratch + 2 * groups_of(m);
  for (int64_t row = row0; row < row1; ++row) {
    decode_row(m, row, weights, scratch);
    for (int64_t t = 0; t < p.wanted; ++t) {
      p.y[t * m.rows + row] = dot(weights, p.x + t * p.stride, m.columns);
    }
  }
}

void decode(const rarefy_matrix& m, int64_t row0, int64_t row1, float* out, float* scratch) {
  for (int64_t row = row0; row < row1; ++row, out += m.columns) decode_row(m, row, out, scratch);
}

}  // namespace

extern const IntKernels int_portable = {arrange, product, decode};

}  // namespace rarefy
