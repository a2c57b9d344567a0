// The paper's kernel: tables of 256 sums in memory, one for every eight inputs; an octet of a
// plane's row is the index.

#include "lut.h"

namespace rarefy {
namespace {

constexpr int64_t kInputs = 8;
constexpr int64_t kEntries = 256;
constexpr int64_t kTile = 256;  // columns whose tables lie in the first cache together

int64_t table_size(int64_t columns) { return (columns + kInputs - 1) / kInputs * kEntries; }

// L[0] = -sum x, and setting bit k adds 2 x_k: one addition an entry, no multiplication.
void build(const float* x, int64_t columns, float* tables) {
  for (int64_t j = 0; j < columns; j += kInputs, tables += kEntries) {
    float inputs[kInputs] = {};
    for (int64_t k = 0; k < at_most(kInputs, columns - j); ++k) inputs[k] = x[j + k];
    tables[0] = 0.0f;
    for (float input : inputs) tables[0] -= input;
    for (int64_t k = 0; k < kInputs; ++k) {
      const int64_t known = int64_t{1} << k;
      const float twice = 2.0f * inputs[k];
      for (int64_t i = 0; i < known; ++i) tables[known + i] = tables[i] + twice;
    }
  }
}

// Sum of `count` neighbouring tables at the given octets. Two sums, so that additions overlap.
float look_up(const float* tables, const uint8_t* octets, int64_t count) {
  float even = 0.0f, odd = 0.0f;
  int64_t c = 0;
  for (; c + 1 < count; c += 2, tables += 2 * kEntries) {
    even += tables[octets[c]];
    odd += tables[kEntries + octets[c + 1]];
  }
  return c < count ? even + odd + tables[octets[c]] : even + odd;
}

// The share of columns `first .. past` of one group in one row's product.
float share(const rarefy_matrix& w, const float* tables, int64_t row, int64_t first, int64_t past) {
  const int64_t group = lut_group(w), groups = groups_of(w);
  const int64_t at = (row * groups + first / group) * w.bits;
  const auto* octets = static_cast<const uint8_t*>(w.codes) + row * w.bits * w.words_per_row * 4;
  const int64_t chunk = first / kInputs, count = (past - first + kInputs - 1) / kInputs;
  float total = 0.0f;
  for (int32_t i = 0; i < w.bits; ++i) {
    const uint8_t* plane = octets + i * w.words_per_row * 4 + chunk;
    total += float_at(w.scales, w.scale_type, at + i) * look_up(tables + chunk * kEntries, plane, count);
  }
  return total;
}

float offset(const rarefy_matrix& w, int64_t index) {
  return lut_offset(w, index, float_at(w.scales, w.scale_type, index * w.bits + w.bits - 1));
}

// Tile by tile of columns, so that a tile's tables serve all rows from the first cache.
void product(const LutJob& job, int64_t row0, int64_t row1, float*) {
  const rarefy_matrix& w = *job.matrix;
  const int64_t n = w.columns, group = lut_group(w), groups = groups_of(w);
  const int64_t size = table_size(n);
  for (int64_t t = 0; t < job.vectors; ++t) {
    float* y = job.y + t * job.stride - job.first;
    const float* sums = job.sums + t * groups;
    for (int64_t row = row0; row < row1; ++row) {
      y[row] = 0.0f;
      if (!w.zeros && !w.extra) continue;
      for (int64_t g = 0; g < groups; ++g) y[row] += offset(w, row * groups + g) * sums[g];
    }
    for (int64_t tile = 0; tile < n; tile += kTile) {
      const int64_t end = at_most(n, tile + kTile);
      for (int64_t row = row0; row < row1; ++row) {
        for (int64_t first = tile, past; first < end; first = past) {
          past = at_most(end, (first / group + 1) * group);
          y[row] += share(w, job.tables + t * size, row, first, past);
        }
      }
    }
  }
}

void decode(const rarefy_matrix& w, int64_t row, float* out) {
  const int64_t n = w.columns, group = lut_group(w), groups = groups_of(w);
  const auto* octets = static_cast<const uint8_t*>(w.codes) + row * w.bits * w.words_per_row * 4;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * group, past = at_most(n, first + group);
    const float beta = offset(w, row * groups + g);
    for (int64_t j = first; j < past; ++j) out[j] = beta;
    for (int32_t i = 0; i < w.bits; ++i) {
      const float scale = float_at(w.scales, w.scale_type, (row * groups + g) * w.bits + i);
      const uint8_t* plane = octets + i * w.words_per_row * 4;
      for (int64_t j = first; j < past; ++j) {
        out[j] += (plane[j / 8] >> (j % 8) & 1) ? scale : -scale;
      }
    }
  }
}

const LutTable kTable = {table_size, build, product, decode};

}  // namespace

const LutTable* lut_portable() { return &kTable; }

}  // namespace rarefy
