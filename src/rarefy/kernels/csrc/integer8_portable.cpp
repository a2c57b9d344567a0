// Any width of codes, any group: codes of a row as bytes, then plain integer sums.

#include "integer8.h"
#include "stream.h"

namespace rarefy {
namespace {

void arrange(const rarefy_matrix& m, const int8_t* c, int8_t* out, int32_t*, int64_t stride) {
  std::memcpy(out, c, m.columns);
  std::memset(out + m.columns, 0, stride - m.columns);
}

int32_t dot(const int16_t* q, const int8_t* c, int64_t count) {
  int32_t sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += q[j] * c[j];
  return sum;
}

void product(const Int8Product& p, int64_t row0, int64_t row1, float* scratch) {
  const rarefy_matrix& m = *p.matrix;
  const int64_t groups = groups_of(m), group = groups > 1 ? m.group : m.columns;
  float* scale = scratch;
  float* zero = scratch + groups;
  const int steps = zero_steps(m), shift = __builtin_ctz(static_cast<unsigned>(steps));
  int16_t* less_zero = reinterpret_cast<int16_t*>(scratch + 2 * groups);
  for (int64_t row = row0; row < row1; ++row) {
    row_scales(m, row, scale);
    row_zeros(m, row, zero);
    // Codes and zero points are counted in the finer steps of the latter.
    Stream stream(row_codes(m, row), m.bits);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t end = at_most(m.columns, (g + 1) * group);
      const int32_t less = static_cast<int32_t>(zero[g] * static_cast<float>(steps));
      for (int64_t j = g * group; j < end; ++j) {
        const int32_t code = static_cast<int32_t>(stream.next() << shift);
        less_zero[j] = static_cast<int16_t>(code - less);
      }
      scale[g] /= static_cast<float>(steps);
    }
    for (int64_t t = 0; t < p.wanted; ++t) {
      const int8_t* c = p.x + t * p.stride;
      const float* blocks = p.blocks == nullptr ? nullptr : p.blocks + t * int8_blocks(p.stride);
      float sum = 0.0f;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t end = at_most(m.columns, (g + 1) * group);
        for (int64_t j = g * group; j < end;) {
          const int64_t next = blocks ? at_most(end, round_up(j + 1, kInputGroup)) : end;
          const float both = blocks ? scale[g] * blocks[j / kInputGroup] : scale[g];
          sum += both * static_cast<float>(dot(less_zero + j, c + j, next - j));
          j = next;
        }
      }
      p.y[t * m.rows + row] = sum * p.scale[t];
    }
  }
}

}  // namespace

extern const Int8Kernels int8_portable = {arrange, product};

}  // namespace rarefy
