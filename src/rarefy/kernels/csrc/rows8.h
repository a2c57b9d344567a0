// The loop that fast products with int8 activations share. What depends on width and instructions
// is a policy W:
//
//   unit     columns of a step; `bytes` of codes and `octets` of an arranged vector that they take
//   scales   groups that a step may meet: every unit / scales columns have one scale; `spread`
//            puts scales into their lanes by a `pattern` that says how many of those share one
//   late     sums of many vectors may do without zero points until the end: with wider codes too
//            much would cancel
//   lanes    32-bit sums of a step; `sums` of arranged codes belong to them one by one
#pragma once

#include "convert.h"
#include "integer8.h"

namespace rarefy {
namespace {

template <class W>
constexpr int64_t block() {
  return W::unit / W::scales;
}

// Whether a step's blocks lie in one group each; zero points have to be integers here.
template <class W>
bool fits8(const rarefy_matrix& m) {
  return zero_steps(m) == 1 && (groups_of(m) == 1 || m.group % block<W>() == 0);
}

// How scales lie over the steps of a row. Where groups and steps divide each other, `per_step` of
// them belong to a step or one belongs to `steps` of them; else, and where columns of the vector have
// scales of their own, they are written out by blocks.
template <class W>
struct Lie {
  int64_t per_step = 1, steps = 1, blocks = 0;
  typename W::Pattern pattern;

  Lie(const rarefy_matrix& m, bool out) {
    int64_t many = groups_of(m) > 1 ? m.group / block<W>() : W::scales;
    if (out || (many % W::scales != 0 && W::scales % many != 0)) {
      blocks = ceil_div(m.columns, W::unit) * W::scales;
      many = 1;
    }
    per_step = many < W::scales ? W::scales / many : 1;
    steps = at_least(1, many / W::scales);
    pattern = W::pattern(at_most(many, W::scales));
  }
};

// One row: its codes (a copy of those at the end, behind which zeros follow), its scales and the
// lower 16 bits of its negative zero points; or, where those are left to the end, each group's
// scale times negative zero point, zeros behind them.
template <class W, bool Late = false>
struct Row8 {
  const uint8_t* codes;
  const float* scale;
  const int32_t* negative;
  const float* shift;
  alignas(64) uint8_t tail[128];

  void open(const Int8Product& p, int64_t row, int64_t safe, const Lie<W>& lie, float* scratch) {
    const rarefy_matrix& m = *p.matrix;
    codes = row_codes(m, row);
    const int64_t from = safe * W::bytes, groups = groups_of(m), room = round_up(groups + 4, 16);
    if (from < m.words_per_row * 4) {
      std::memset(tail, 0, sizeof(tail));
      std::memcpy(tail, codes + from, at_most(sizeof(tail), m.words_per_row * 4 - from));
    }
    float* s = scratch;
    int32_t* z = reinterpret_cast<int32_t*>(scratch + room);
    row_scales(m, row, s);
    row_zeros(m, row, scratch + room);
    for (int64_t g = 0; g < groups; ++g) {
      const float zero = scratch[room + g];
      z[g] = Late ? bits_as<int32_t>(-s[g] * zero) : -static_cast<int32_t>(zero) & 0xFFFF;
    }
    for (int64_t g = groups; g < room; ++g) s[g] = 0.0f, z[g] = 0;
    scale = s;
    negative = z;
    shift = scratch + room;
    if (lie.blocks == 0) return;
    spread(groups > 1 ? m.group / block<W>() : lie.blocks, p.blocks, lie.blocks, scratch + 2 * room);
  }

  void spread(int64_t many, const float* inputs, int64_t blocks, float* scratch) {
    float* s = scratch;
    int32_t* z = reinterpret_cast<int32_t*>(scratch + blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      s[b] = scale[b / many];
      if (inputs != nullptr) s[b] *= inputs[b * block<W>() / kInputGroup];
      z[b] = negative[b / many];
    }
    scale = s;
    negative = z;
  }
};

// Several groups a row: sums become floats, times their scale, at every step. Of many vectors, what
// the zero points take away is subtracted at the end, from the sums of each group's codes.
template <class W, int R, int T>
void product8_of_groups(const Int8Product& p, int64_t row0, float* scratch) {
  const rarefy_matrix& m = *p.matrix;
  const int64_t units = ceil_div(m.columns, W::unit), room = int8_scratch(m) / 4;
  const int64_t safe = at_most(units, m.words_per_row * 4 / W::bytes);
  const int64_t distance = R * m.words_per_row * 4;
  constexpr bool late = W::late && T == 8;
  const Lie<W> lie(m, p.blocks != nullptr);
  Row8<W, late> row[R];
  typename W::F sum[R][T];
  for (int r = 0; r < R; ++r) row[r].open(p, row0 + r, safe, lie, scratch + r * room);
  RAREFY_UNROLL
  for (int r = 0; r < R; ++r) {
    RAREFY_UNROLL
    for (int t = 0; t < T; ++t) sum[r][t] = W::zero();
  }
  const auto step = [&](int64_t u, int64_t g, bool inner) RAREFY_INLINE {
    RAREFY_UNROLL
    for (int r = 0; r < R; ++r) {
      if (inner) ahead(row[r].codes + u * W::bytes + distance);
      const typename W::Q q =
          W::codes(inner ? row[r].codes + u * W::bytes : row[r].tail + (u - safe) * W::bytes);
      const typename W::F scale = W::spread(row[r].scale + g, lie.pattern);
      const typename W::I negative =
          late ? W::none() : W::spread(row[r].negative + g, lie.pattern);
      RAREFY_UNROLL
      for (int t = 0; t < T; ++t) {
        const typename W::I less =
            late ? W::none()
                 : W::pairs(negative, W::sums(p.sums + t * p.stride + u * W::lanes), W::none());
        const typename W::I exact = W::dot(q, p.x + t * p.stride + u * W::octets, less);
        sum[r][t] = W::fma(W::floats(exact), scale, sum[r][t]);
      }
    }
  };
  for (int64_t u = 0, g = 0; u < units; g += lie.per_step) {
    const int64_t end = at_most(units, u + lie.steps), border = at_least(u, at_most(end, safe));
    for (; u < border; ++u) step(u, g, true);
    for (; u < end; ++u) step(u, g, false);
  }
  if (late) {
    for (int64_t g = 0; g < groups_of(m); g += W::lanes) {
      RAREFY_UNROLL
      for (int t = 0; t < T; ++t) {
        const typename W::F codes = W::load(sums_of_groups(p.sums + t * p.stride, p.stride) + g);
        RAREFY_UNROLL
        for (int r = 0; r < R; ++r) sum[r][t] = W::fma(W::load(row[r].shift + g), codes, sum[r][t]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T && t < p.wanted; ++t) {
      p.y[t * m.rows + row0 + r] = W::total(sum[r][t]) * p.scale[t];
    }
  }
}

// One scale a row: sums stay integers to the end.
template <class W, int R, int T>
void product8_of_rows(const Int8Product& p, int64_t row0, float* scratch) {
  const rarefy_matrix& m = *p.matrix;
  const int64_t units = ceil_div(m.columns, W::unit), room = int8_scratch(m) / 4;
  const int64_t safe = at_most(units, m.words_per_row * 4 / W::bytes);
  const int64_t distance = R * m.words_per_row * 4;
  const Lie<W> lie(m, false);
  Row8<W> row[R];
  typename W::I sum[R][T];
  for (int r = 0; r < R; ++r) row[r].open(p, row0 + r, safe, lie, scratch + r * room);
  RAREFY_UNROLL
  for (int r = 0; r < R; ++r) {
    RAREFY_UNROLL
    for (int t = 0; t < T; ++t) sum[r][t] = W::none();
  }
  const auto step = [&](int64_t u, bool inner) RAREFY_INLINE {
    RAREFY_UNROLL
    for (int r = 0; r < R; ++r) {
      if (inner) ahead(row[r].codes + u * W::bytes + distance);
      const typename W::Q q =
          W::codes(inner ? row[r].codes + u * W::bytes : row[r].tail + (u - safe) * W::bytes);
      RAREFY_UNROLL
      for (int t = 0; t < T; ++t) {
        sum[r][t] = W::dot(q, p.x + t * p.stride + u * W::octets, sum[r][t]);
      }
    }
  };
  for (int64_t u = 0; u < safe; ++u) step(u, true);
  for (int64_t u = safe; u < units; ++u) step(u, false);
  for (int r = 0; r < R; ++r) {
    const int32_t zero = -row[r].negative[0] & 0xFFFF;
    for (int t = 0; t < T && t < p.wanted; ++t) {
      const int32_t exact = W::total(sum[r][t]) - zero * p.totals[t];
      p.y[t * m.rows + row0 + r] = static_cast<float>(exact) * row[r].scale[0] * p.scale[t];
    }
  }
}

template <class W, int R, int T>
void product8_of_part(const Int8Product& p, int64_t row0, int64_t row1, float* scratch) {
  const bool whole = groups_of(*p.matrix) == 1 && p.blocks == nullptr;
  for (; row0 + R <= row1; row0 += R) {
    whole ? product8_of_rows<W, R, T>(p, row0, scratch)
          : product8_of_groups<W, R, T>(p, row0, scratch);
  }
  for (; row0 < row1; ++row0) {
    whole ? product8_of_rows<W, 1, T>(p, row0, scratch)
          : product8_of_groups<W, 1, T>(p, row0, scratch);
  }
}

// Vector t of a product.
inline Int8Product one_of(const Int8Product& p, int64_t t) {
  Int8Product one = p;
  one.x += t * p.stride;
  one.sums += t * p.stride;
  one.totals += t;
  one.scale += t;
  if (p.blocks != nullptr) one.blocks += t * int8_blocks(p.stride);
  one.y += t * p.matrix->rows;
  one.vectors = one.wanted = 1;
  return one;
}

// Where columns have scales of their own, vectors share no more than the cache.
template <class W>
void product8_of(const Int8Product& p, int64_t row0, int64_t row1, float* scratch) {
  if (p.blocks != nullptr && p.vectors > 1) {
    for (int64_t t = 0; t < p.wanted; ++t) product8_of<W>(one_of(p, t), row0, row1, scratch);
    return;
  }
  switch (p.vectors) {
    case 1:
      return product8_of_part<W, 4, 1>(p, row0, row1, scratch);
    case 2:
      return product8_of_part<W, 4, 2>(p, row0, row1, scratch);
    case 4:
      return product8_of_part<W, W::rows(4), 4>(p, row0, row1, scratch);
    default:
      return product8_of_part<W, W::rows(8), 8>(p, row0, row1, scratch);
  }
}

// Codes of 4 bits: of each run of `half` bytes the lower and then the upper halves, which are the
// even and then the odd columns; sums of the eight codes of a word.
inline void arrange_nibbles(const int8_t* c, int64_t columns, int half, int8_t* out, int32_t* sums) {
  const int64_t units = ceil_div(columns, 2 * half);
  for (int64_t u = 0; u < units; ++u, out += 2 * half) {
    for (int k = 0; k < half; ++k) {
      const int64_t j = u * 2 * half + 2 * k;
      out[k] = j < columns ? c[j] : 0;
      out[half + k] = j + 1 < columns ? c[j + 1] : 0;
    }
    for (int word = 0; word < half / 4; ++word) {
      int32_t sum = 0;
      for (int k = 4 * word; k < 4 * word + 4; ++k) sum += out[k] + out[half + k];
      *sums++ = sum;
    }
  }
}

}  // namespace
}  // namespace rarefy
