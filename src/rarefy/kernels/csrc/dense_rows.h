// The loop of dense products. A policy W says how `lanes` elements of a type become floats, and how
// fewer at the end of a row do.
#pragma once

#include "convert.h"
#include "dense.h"

namespace rarefy {
namespace {

constexpr int64_t kDenseAhead = 512;  // bytes; see kAhead in rows.h

// Rows row0, row0 + apart, ... of the product.
template <class W, int R, int T>
void dense_rows(const rarefy_matrix& m, const float* x, float* y, int64_t row0, int64_t apart) {
  using V = typename W::V;
  const int64_t n = m.columns, whole = n / W::lanes * W::lanes;
  const typename W::Element* weight = static_cast<const typename W::Element*>(m.codes) + row0 * n;
  V sum[R][T];
  RAREFY_UNROLL
  for (int r = 0; r < R; ++r) {
    RAREFY_UNROLL
    for (int t = 0; t < T; ++t) sum[r][t] = W::zero();
  }
  const auto step = [&](int64_t j, int64_t count) {
    V part[T];
    RAREFY_UNROLL
    for (int t = 0; t < T; ++t) part[t] = W::floats(x + t * n + j, count);
    RAREFY_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename W::Element* at = weight + r * apart * n + j;
      ahead(reinterpret_cast<const uint8_t*>(at) + kDenseAhead);
      const V w = W::weights(at, count);
      RAREFY_UNROLL
      for (int t = 0; t < T; ++t) sum[r][t] = W::fma(w, part[t], sum[r][t]);
    }
  };
  for (int64_t j = 0; j < whole; j += W::lanes) step(j, W::lanes);
  if (whole < n) step(whole, n - whole);
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) y[t * m.rows + row0 + r * apart] = W::horizontal(sum[r][t]);
  }
}

template <class W, int R, int T>
void dense_part(const rarefy_matrix& m, const float* x, float* y, int64_t row0, int64_t row1) {
  const int64_t apart = (row1 - row0) / R;
  for (int64_t i = 0; i < apart; ++i) dense_rows<W, R, T>(m, x, y, row0 + i, apart);
  for (row0 += R * apart; row0 < row1; ++row0) dense_rows<W, 1, T>(m, x, y, row0, 1);
}

template <class W>
void dense_product(const rarefy_matrix& m, const float* x, float* y, int64_t vectors, int64_t row0,
                   int64_t row1) {
  for (; vectors >= 4; vectors -= 4, x += 4 * m.columns, y += 4 * m.rows) {
    dense_part<W, 2, 4>(m, x, y, row0, row1);
  }
  for (; vectors > 0; --vectors, x += m.columns, y += m.rows) {
    dense_part<W, 4, 1>(m, x, y, row0, row1);
  }
}

template <class W>
void dense_decode(const rarefy_matrix& m, int64_t row0, int64_t row1, float* out) {
  const typename W::Element* weight = static_cast<const typename W::Element*>(m.codes) + row0 * m.columns;
  const int64_t count = (row1 - row0) * m.columns;
  int64_t j = 0;
  for (; j + W::lanes <= count; j += W::lanes) W::store(out + j, W::weights(weight + j, W::lanes));
  alignas(64) float rest[W::lanes];
  if (j < count) {
    W::store(rest, W::weights(weight + j, count - j));
    std::memcpy(out + j, rest, (count - j) * sizeof(float));
  }
}

// The functions of one level, from its policy for each type.
template <template <int> class W>
void product_by_kind(const rarefy_matrix& m, const float* x, float* y, int64_t vectors,
                     int64_t row0, int64_t row1) {
  if (m.kind == RAREFY_F32) return dense_product<W<RAREFY_F32>>(m, x, y, vectors, row0, row1);
  if (m.kind == RAREFY_F16) return dense_product<W<RAREFY_F16>>(m, x, y, vectors, row0, row1);
  dense_product<W<RAREFY_BF16>>(m, x, y, vectors, row0, row1);
}

template <template <int> class W>
void decode_by_kind(const rarefy_matrix& m, int64_t row0, int64_t row1, float* out) {
  if (m.kind == RAREFY_F32) return dense_decode<W<RAREFY_F32>>(m, row0, row1, out);
  if (m.kind == RAREFY_F16) return dense_decode<W<RAREFY_F16>>(m, row0, row1, out);
  dense_decode<W<RAREFY_BF16>>(m, row0, row1, out);
}

template <int Kind>
struct ElementOf {
  using Type = uint16_t;
};
template <>
struct ElementOf<RAREFY_F32> {
  using Type = float;
};

}  // namespace
}  // namespace rarefy
