// Look-up with the tables in registers. Four inputs have 16 signed sums, which is what one permute
// instruction can look up for every lane at once; the lanes are neighbouring rows. The including
// file defines `Simd`, the vectors of its instruction set.
//
// Rows lie one after the other in memory, so a block of L rows is turned first: word by word, the L
// rows' words side by side.

#include "lut.h"

namespace rarefy {
namespace {

constexpr int64_t L = Simd::kLanes;
constexpr int64_t kInputs = 4;
constexpr int64_t kEntries = 16;
constexpr int64_t kKeys = 8;    // in a word

using Float = Simd::Float;
using Word = Simd::Word;

int64_t table_size(int64_t columns) { return ceil_div(columns, 32) * kKeys * kEntries; }

// L[0] = -sum x, and setting bit k adds 2 x_k.
void build(const float* x, int64_t columns, float* tables) {
  const int64_t count = table_size(columns) / kEntries;
  for (int64_t c = 0; c < count; ++c, tables += kEntries) {
    float inputs[kInputs] = {};
    for (int64_t k = 0; k < kInputs && c * kInputs + k < columns; ++k) {
      inputs[k] = x[c * kInputs + k];
    }
    tables[0] = -(inputs[0] + inputs[1] + inputs[2] + inputs[3]);
    for (int64_t k = 0; k < kInputs; ++k) {
      const float twice = 2.0f * inputs[k];
      for (int64_t i = 0; i < int64_t{1} << k; ++i) tables[(1 << k) + i] = tables[i] + twice;
    }
  }
}

// `count` entries of L rows, turned: entry e of row l goes to out[e * stride + l].
template <class Load, class T>
void turn(const Load& load, int64_t count, T* out, int64_t stride) {
  for (int64_t e = 0; e < count; e += L) {
    const int64_t here = at_most(L, count - e);
    Word square[L];
    for (int64_t l = 0; l < L; ++l) square[l] = load(l, e, here);
    Simd::transpose(square);
    for (int64_t k = 0; k < here; ++k) Simd::store(out + (e + k) * stride, square[k]);
  }
}

// A block of L rows, of which the last may be missing: those repeat the matrix' last row.
struct Block {
  const rarefy_matrix& w;
  int64_t row, groups;
  uint32_t* words;  // [kLutTile, bits, L]
  float* scales;    // [G, bits, L]
  float* offsets;   // [G, L]

  Block(const rarefy_matrix& matrix, int64_t first, float* scratch)
      : w(matrix),
        row(first),
        groups(groups_of(matrix)),
        words(reinterpret_cast<uint32_t*>(scratch)),
        scales(scratch + kLutTile * matrix.bits * L),
        offsets(scales + groups * matrix.bits * L) {}

  int64_t at(int64_t lane) const { return at_most(row + lane, w.rows - 1); }

  void turn_scales() {
    const int64_t count = groups * w.bits;
    turn([&](int64_t l, int64_t e, int64_t here) {
      return Simd::load_floats(w.scales, w.scale_type, at(l) * count + e, here);
    }, count, scales, L);
    if (w.zeros) {
      turn([&](int64_t l, int64_t e, int64_t here) {
        return Simd::load_floats(w.zeros, w.scale_type, at(l) * groups + e, here);
      }, groups, offsets, L);
    }
    if (!w.extra) return;
    turn([&](int64_t l, int64_t e, int64_t here) {
      return Simd::load_units(static_cast<const int16_t*>(w.extra) + at(l) * groups + e, here);
    }, groups, offsets, L);
    for (int64_t g = 0; g < groups; ++g) {
      const float* last = scales + (g * w.bits + w.bits - 1) * L;
      float* offset = offsets + g * L;
      for (int64_t l = 0; l < L; ++l) offset[l] *= last[l];
    }
  }

  void turn_words(int64_t first, int64_t count) {
    const auto* codes = static_cast<const uint32_t*>(w.codes);
    for (int64_t i = 0; i < w.bits; ++i) {
      turn([&](int64_t l, int64_t e, int64_t here) {
        return Simd::load_words(codes + (at(l) * w.bits + i) * w.words_per_row + first + e, here);
      }, count, words + i * L, w.bits * L);
    }
  }
};

// sum_i alpha_i sum_c T_c[key] over keys `first .. past`, counted from the first of `words`.
template <int Q>
Float share(const uint32_t* words, const float* tables, const float* scales, int64_t first,
            int64_t past) {
  constexpr int kChains = Q <= 2 ? 2 : 1;  // of additions that do not wait for each other
  Float sums[Q][kChains];
  for (auto& plane : sums) for (Float& sum : plane) sum = Simd::zero();
  for (int64_t word = first / kKeys; word * kKeys < past; ++word) {
    const int64_t begin = at_least(first - word * kKeys, 0);
    const int64_t end = at_most(past - word * kKeys, kKeys);
    const float* table = tables + word * kKeys * kEntries;
    Word keys[Q];
    for (int i = 0; i < Q; ++i) keys[i] = Simd::load(words + (word * Q + i) * L);
    if (end - begin == kKeys) {
#pragma GCC unroll 8
      for (int k = 0; k < kKeys; ++k) {
        const Simd::Table here(table + k * kEntries);
        for (int i = 0; i < Q; ++i) {
          Float& sum = sums[i][k % kChains];
          sum = Simd::add(sum, here.at(keys[i]));
          keys[i] = Simd::next(keys[i]);
        }
      }
      continue;
    }
    for (int64_t k = 0; k < end; ++k) {
      const Simd::Table here(table + k * kEntries);
      for (int i = 0; i < Q; ++i) {
        if (k >= begin) sums[i][0] = Simd::add(sums[i][0], here.at(keys[i]));
        keys[i] = Simd::next(keys[i]);
      }
    }
  }
  Float total = Simd::zero();
  for (int i = 0; i < Q; ++i) {
    Float sum = sums[i][0];
    if (kChains == 2) sum = Simd::add(sum, sums[i][kChains - 1]);
    total = Simd::multiply_add(Simd::load_float(scales + i * L), sum, total);
  }
  return total;
}

template <int Q>
void product_of(const LutJob& job, int64_t row0, int64_t row1, float* scratch) {
  const rarefy_matrix& w = *job.matrix;
  const int64_t n = w.columns, group = lut_group(w), groups = groups_of(w);
  const int64_t size = table_size(n), all = ceil_div(n, 32);
  for (int64_t row = row0; row < row1; row += L) {
    Block block(w, row, scratch);
    block.turn_scales();
    Float y[kLutVectors];
    for (int64_t t = 0; t < job.vectors; ++t) {
      y[t] = Simd::zero();
      for (int64_t g = 0; g < groups && (w.zeros || w.extra); ++g) {
        const Float sum = Simd::spread(job.sums[t * groups + g]);
        y[t] = Simd::multiply_add(Simd::load_float(block.offsets + g * L), sum, y[t]);
      }
    }
    for (int64_t tile = 0; tile < all; tile += kLutTile) {
      const int64_t count = at_most(kLutTile, all - tile), end = at_most(n, (tile + count) * 32);
      block.turn_words(tile, count);
      for (int64_t t = 0; t < job.vectors; ++t) {
        const float* tables = job.tables + t * size + tile * kKeys * kEntries;
        for (int64_t first = tile * 32, past; first < end; first = past) {
          const int64_t g = first / group;
          past = at_most(end, (g + 1) * group);
          const int64_t key0 = first / kInputs - tile * kKeys;
          const int64_t key1 = (past + kInputs - 1) / kInputs - tile * kKeys;
          const float* scale = block.scales + g * Q * L;
          y[t] = Simd::add(y[t], share<Q>(block.words, tables, scale, key0, key1));
        }
      }
    }
    for (int64_t t = 0; t < job.vectors; ++t) {
      Simd::store_first(job.y + t * job.stride + row - job.first, y[t], at_most(L, row1 - row));
    }
  }
}

void product(const LutJob& job, int64_t row0, int64_t row1, float* scratch) {
  switch (job.matrix->bits) {
    case 1: return product_of<1>(job, row0, row1, scratch);
    case 2: return product_of<2>(job, row0, row1, scratch);
    case 3: return product_of<3>(job, row0, row1, scratch);
    case 4: return product_of<4>(job, row0, row1, scratch);
    case 5: return product_of<5>(job, row0, row1, scratch);
    case 6: return product_of<6>(job, row0, row1, scratch);
    case 7: return product_of<7>(job, row0, row1, scratch);
    default: return product_of<8>(job, row0, row1, scratch);
  }
}

void decode(const rarefy_matrix& w, int64_t row, float* out) {
  const int64_t n = w.columns, group = lut_group(w), groups = groups_of(w);
  const auto* octets = static_cast<const uint8_t*>(w.codes) + row * w.bits * w.words_per_row * 4;
  const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int64_t g = 0; g < groups; ++g) {
    float scale[8];
    for (int32_t i = 0; i < w.bits; ++i) scale[i] = float_at(w.scales, w.scale_type, (row * groups + g) * w.bits + i);
    const float offset = lut_offset(w, row * groups + g, scale[w.bits - 1]);
    const int64_t past = at_most(n, (g + 1) * group);
    for (int64_t j = g * group; j < past; j += 8) {
      __m256 value = _mm256_set1_ps(offset);
      for (int32_t i = 0; i < w.bits; ++i) {
        const __m256i octet = _mm256_set1_epi32(octets[i * w.words_per_row * 4 + j / 8]);
        const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(octet, places), places);
        const __m256 alpha = _mm256_set1_ps(scale[i]);
        const __m256 minus = _mm256_sub_ps(_mm256_setzero_ps(), alpha);
        value = _mm256_add_ps(value, _mm256_blendv_ps(minus, alpha, _mm256_castsi256_ps(set)));
      }
      if (j + 8 <= past) {
        _mm256_storeu_ps(out + j, value);
        continue;
      }
      float last[8];
      _mm256_storeu_ps(last, value);
      for (int64_t k = 0; j + k < past; ++k) out[j + k] = last[k];
    }
  }
}

const LutTable kTable = {table_size, build, product, decode};

}  // namespace
}  // namespace rarefy
