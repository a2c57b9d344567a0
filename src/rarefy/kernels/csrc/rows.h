// The loop that all fast products share: a few rows at a time, group by group, one unit of codes
// after the other. What depends on width and instructions is a policy W:
//
//   unit      columns that `weights` decodes at once; `bytes` of codes they take, `reach` bytes
//             that it reads
//   vectors   registers that they fill; `lanes` floats in each
//   Group     what a group's weights depend on, from `group(...)`
//   factored  whether sums of a group still are to be multiplied by `factor`
#pragma once

#include "convert.h"
#include "integer.h"

namespace rarefy {
namespace {

// Groups whose parameters are kept at addresses that the compiler knows; pointers to every row's
// would take more registers than there are.
constexpr int kNear = 16;

// Scale and zero point of each group.
struct Centred {
  const float* scale;
  const float* zero;

  void read(const rarefy_matrix& m, int64_t row, float* scratch) {
    float* zeros = scratch + round_up(groups_of(m), 16);
    row_scales(m, row, scratch);
    row_zeros(m, row, zeros);
    scale = scratch;
    zero = zeros;
  }

  // Of kNear groups from g on, in memory of the caller's.
  RAREFY_INLINE Centred near(float* room, int64_t g) const {
    std::memcpy(room, scale + g, kNear * sizeof(float));
    std::memcpy(room + kNear, zero + g, kNear * sizeof(float));
    return {room, room + kNear};
  }
};

// One row's codes, of which those read past the end of the row come from a copy.
template <class W>
struct Row {
  const uint8_t* codes;
  alignas(64) uint8_t tail[192];

  void open(const rarefy_matrix& m, int64_t row, int64_t safe, int64_t units) {
    codes = row_codes(m, row);
    if (safe == units) return;
    const int64_t from = safe * W::bytes;
    std::memset(tail, 0, sizeof(tail));
    std::memcpy(tail, codes + from, at_most(sizeof(tail), m.words_per_row * 4 - from));
  }

  const uint8_t* unit(int64_t u, int64_t safe) const {
    return u < safe ? codes + u * W::bytes : tail + (u - safe) * W::bytes;
  }
};

// Units, of those a row has, whose reads end within the row.
template <class W>
int64_t safe_units(const rarefy_matrix& m, int64_t units) {
  const int64_t room = m.words_per_row * 4 - W::reach;
  return room < 0 ? 0 : at_most(units, room / W::bytes + 1);
}

// Bytes that a row's codes are fetched ahead. Each of the rows that are read together lies in pages
// of its own, so that the processor, too, sees a stream that it can follow.
constexpr int64_t kAhead = 384;
constexpr int kUnrolled = 4;  // units of a group, without a branch between them

template <class W>
int64_t units_of_group(const rarefy_matrix& m) {
  return groups_of(m) > 1 ? m.group / W::unit : ceil_div(m.columns, W::unit);
}

// Weights of a group, and its sums: those of the row so far, or none if they still get a factor.
template <class W, int R, int T, int C>
RAREFY_INLINE inline void begin_group(const Centred (&row)[R], int64_t g,
                                      const typename W::V (&total)[R][T][C],
                                      typename W::Group (&group)[R], typename W::V (&sum)[R][T][C]) {
  RAREFY_UNROLL
  for (int r = 0; r < R; ++r) {
    group[r] = W::group(row[r], g);
    RAREFY_UNROLL
    for (int t = 0; t < T; ++t) {
      RAREFY_UNROLL
      for (int c = 0; c < C; ++c) sum[r][t][c] = W::factored ? W::zero() : total[r][t][c];
    }
  }
}

template <class W, int R, int T, int C>
RAREFY_INLINE inline void end_group(const Centred (&row)[R], int64_t g,
                                    const typename W::V (&sum)[R][T][C],
                                    typename W::V (&total)[R][T][C]) {
  RAREFY_UNROLL
  for (int r = 0; r < R; ++r) {
    RAREFY_UNROLL
    for (int t = 0; t < T; ++t) {
      RAREFY_UNROLL
      for (int c = 0; c < C; ++c) {
        total[r][t][c] = W::factored
                             ? W::fma(W::factor(row[r], g), sum[r][t][c], total[r][t][c])
                             : sum[r][t][c];
      }
    }
  }
}

// The first `groups` groups, all of whose units can be read in place: nothing but pointers that move.
template <class W, int R, int T, int C>
RAREFY_INLINE inline void plain_groups(const IntProduct& p, const Row<W> (&rows)[R],
                                       const Centred (&row)[R], int64_t groups,
                                       int64_t many, typename W::V (&total)[R][T][C]) {
  using V = typename W::V;
  const uint8_t* codes[R];
  RAREFY_UNROLL
  for (int r = 0; r < R; ++r) codes[r] = rows[r].codes;
  const float* x = p.x;
  const int64_t stride = p.stride;
  for (int64_t first = 0; first < groups; first += kNear) {
    alignas(64) float room[R][2 * kNear];
    Centred near[R];
    RAREFY_UNROLL
    for (int r = 0; r < R; ++r) near[r] = row[r].near(room[r], first);
    const int64_t some = at_most(kNear, groups - first);
    for (int64_t g = 0; g < some; ++g) {
      typename W::Group group[R];
      V sum[R][T][C];
      begin_group<W, R, T, C>(near, g, total, group, sum);
      for (int64_t left = many; left > 0; left -= kUnrolled) {
        RAREFY_UNROLL
        for (int k = 0; k < kUnrolled; ++k) {
          RAREFY_UNROLL
          for (int r = 0; r < R; ++r) {
            V weight[W::vectors];
            W::weights(codes[r] + k * W::bytes, group[r], weight);
            RAREFY_UNROLL
            for (int t = 0; t < T; ++t) {
              RAREFY_UNROLL
              for (int v = 0; v < W::vectors; ++v) {
                const V input = W::load(x + t * stride + k * W::unit + v * W::lanes);
                sum[r][t][v % C] = W::fma(weight[v], input, sum[r][t][v % C]);
              }
            }
          }
        }
        RAREFY_UNROLL
        for (int r = 0; r < R; ++r) {
          ahead(codes[r] + kAhead);
          codes[r] += kUnrolled * W::bytes;
        }
        x += kUnrolled * W::unit;
      }
      end_group<W, R, T, C>(near, g, sum, total);
    }
  }
}

template <class W, int R, int T>
void product_of_rows(const IntProduct& p, int64_t row0, int64_t apart, float* scratch) {
  using V = typename W::V;
  constexpr int C = T == 1 && W::vectors > 1 ? 2 : 1;  // independent sums of a row and vector
  const rarefy_matrix& m = *p.matrix;
  const int64_t units = ceil_div(m.columns, W::unit), safe = safe_units<W>(m, units);
  const int64_t groups = groups_of(m), many = units_of_group<W>(m), room = 2 * round_up(groups, 16);
  Row<W> row[R];
  Centred parameters[R];
  for (int r = 0; r < R; ++r) {
    row[r].open(m, row0 + r * apart, safe, units);
    parameters[r].read(m, row0 + r * apart, scratch + r * room);
  }
  V total[R][T][C];
  RAREFY_UNROLL
  for (int r = 0; r < R; ++r) {
    RAREFY_UNROLL
    for (int t = 0; t < T; ++t) {
      RAREFY_UNROLL
      for (int c = 0; c < C; ++c) total[r][t][c] = W::zero();
    }
  }
  const int64_t plain = many % kUnrolled == 0 ? safe / many : 0;
  plain_groups<W, R, T, C>(p, row, parameters, plain, many, total);
  for (int64_t g = plain; g < groups; ++g) {
    typename W::Group group[R];
    V sum[R][T][C];
    begin_group<W, R, T, C>(parameters, g, total, group, sum);
    const auto step = [&](int64_t u, bool inner) RAREFY_INLINE {
      const float* x = p.x + u * W::unit;
      RAREFY_UNROLL
      for (int r = 0; r < R; ++r) {
        V weight[W::vectors];
        W::weights(inner ? row[r].codes + u * W::bytes : row[r].unit(u, safe), group[r], weight);
        RAREFY_UNROLL
        for (int t = 0; t < T; ++t) {
          RAREFY_UNROLL
          for (int v = 0; v < W::vectors; ++v) {
            sum[r][t][v % C] =
                W::fma(weight[v], W::load(x + t * p.stride + v * W::lanes), sum[r][t][v % C]);
          }
        }
      }
    };
    const int64_t first = g * many, last = at_most(units, first + many);
    const int64_t border = at_least(first, at_most(last, safe));
    int64_t u = first;
    for (; u < border; ++u) step(u, true);
    for (; u < last; ++u) step(u, false);
    end_group<W, R, T, C>(parameters, g, sum, total);
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T && t < p.wanted; ++t) {
      V whole = total[r][t][0];
      if (C == 2) whole = W::add(whole, total[r][t][C - 1]);
      p.y[t * m.rows + row0 + r * apart] = W::horizontal(whole);
    }
  }
}

// R rows at a time, and the rest one by one.
template <class W, int R, int T>
void product_of_part(const IntProduct& p, int64_t row0, int64_t row1, float* scratch) {
  const int64_t apart = (row1 - row0) / R;
  for (int64_t i = 0; i < apart; ++i) product_of_rows<W, R, T>(p, row0 + i, apart, scratch);
  for (row0 += R * apart; row0 < row1; ++row0) product_of_rows<W, 1, T>(p, row0, 1, scratch);
}

template <class W>
void product_of(const IntProduct& p, int64_t row0, int64_t row1, float* scratch) {
  switch (p.vectors) {
    case 1:
      return product_of_part<W, W::rows(1), 1>(p, row0, row1, scratch);
    case 2:
      return product_of_part<W, W::rows(2), 2>(p, row0, row1, scratch);
    case 4:
      return product_of_part<W, W::rows(4), 4>(p, row0, row1, scratch);
    default:
      return product_of_part<W, W::rows(8), 8>(p, row0, row1, scratch);
  }
}

template <class W>
void decode_rows(const rarefy_matrix& m, int64_t row0, int64_t row1, float* out, float* scratch) {
  const int64_t units = ceil_div(m.columns, W::unit), safe = safe_units<W>(m, units);
  const int64_t many = units_of_group<W>(m), whole = at_most(safe, m.columns / W::unit);
  alignas(64) float last[W::unit];
  for (int64_t r = row0; r < row1; ++r, out += m.columns) {
    Row<W> row;
    row.open(m, r, safe, units);
    Centred parameters;
    parameters.read(m, r, scratch);
    for (int64_t u = 0, g = 0; u < units; ++g) {
      const typename W::Group group = W::group(parameters, g);
      const int64_t end = at_most(units, u + many), border = at_most(end, whole);
      for (; u + kUnrolled <= border; u += kUnrolled) {
        RAREFY_UNROLL
        for (int k = 0; k < kUnrolled; ++k) {
          typename W::V weight[W::vectors];
          W::weights(row.codes + (u + k) * W::bytes, group, weight);
          RAREFY_UNROLL
          for (int v = 0; v < W::vectors; ++v) {
            W::store(out + (u + k) * W::unit + v * W::lanes, W::natural(weight[v]));
          }
        }
      }
      for (; u < end; ++u) {
        typename W::V weight[W::vectors];
        W::weights(row.unit(u, safe), group, weight);
        const int64_t left = m.columns - u * W::unit;
        float* to = left >= W::unit ? out + u * W::unit : last;
        RAREFY_UNROLL
        for (int v = 0; v < W::vectors; ++v) W::store(to + v * W::lanes, W::natural(weight[v]));
        if (left < W::unit) std::memcpy(out + u * W::unit, last, left * sizeof(float));
      }
    }
  }
}

// Whether groups are whole units, so that a unit has one scale.
template <class W>
bool fits(const rarefy_matrix& m) {
  return groups_of(m) == 1 || m.group % W::unit == 0;
}

// Vector x in the order in which units meet it; `order` maps places of a unit to columns.
inline void arrange_units(const float* x, int64_t columns, const uint8_t* order, int unit, float* out,
                          int64_t stride) {
  int64_t j = 0;
  for (; j + unit <= columns; j += unit) {
    for (int k = 0; k < unit; ++k) out[j + k] = x[j + order[k]];
  }
  std::memset(out + j, 0, (stride - j) * sizeof(float));
  for (int k = 0; j < columns && k < unit; ++k) {
    if (j + order[k] < columns) out[j + k] = x[j + order[k]];
  }
}

inline void arrange_plainly(const float* x, int64_t columns, float* out, int64_t stride) {
  std::memcpy(out, x, columns * sizeof(float));
  std::memset(out + columns, 0, (stride - columns) * sizeof(float));
}

}  // namespace
}  // namespace rarefy
