// Codes of 2, 3 and 4 bits index a register that holds the values of their group; the instruction
// reads four bits of each index, so shifted codes need no mask. Codes of 8 bits are converted.

#include <immintrin.h>

#include "rows.h"

namespace rarefy {
namespace {

struct Wide {
  using V = __m512;
  static constexpr int lanes = 16;
  static constexpr bool factored = false;
  static constexpr int rows(int together) { return together == 8 ? 2 : 4; }
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* at) { return _mm512_loadu_ps(at); }
  static void store(float* at, V v) { _mm512_storeu_ps(at, v); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V factor(const Centred&, int64_t) { return zero(); }
  static V natural(V v) { return v; }
  static float horizontal(V v) { return _mm512_reduce_add_ps(v); }
};

// What weights of a group are computed with.
struct Affine {
  __m512 scale, zero;

  Affine() = default;
  Affine(const Centred& row, int64_t g)
      : scale(_mm512_set1_ps(row.scale[g])), zero(_mm512_set1_ps(row.zero[g])) {}

  __m512 weights(__m512 codes) const { return _mm512_mul_ps(_mm512_sub_ps(codes, zero), scale); }
  __m512 weights(__m512i codes) const { return weights(_mm512_cvtepi32_ps(codes)); }
};

template <int Bits>
struct Table : Wide {
  using Group = __m512;
  static constexpr int unit = 16, vectors = 1, bytes = 2 * Bits, reach = Bits == 3 ? 8 : bytes;

  static Group group(const Centred& row, int64_t g) {
    constexpr int last = (1 << Bits) - 1;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return Affine(row, g).weights(_mm512_and_si512(lane, _mm512_set1_epi32(last)));
  }

  static void weights(const uint8_t* codes, Group table, V* out) {
    out[0] = _mm512_permutexvar_ps(indices(codes), table);
  }

  static __m512i indices(const uint8_t* codes) {
    if (Bits == 2) {
      const __m512i shift =
          _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
      return _mm512_srlv_epi32(_mm512_set1_epi32(rarefy::load<int32_t>(codes)), shift);
    }
    const __m512i both = _mm512_set1_epi64(rarefy::load<int64_t>(codes));
    if (Bits == 4) {  // even lanes see the first word and odd lanes the second
      const __m512i shift =
          _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
      return _mm512_srlv_epi32(both, shift);
    }
    // Each lane takes the two bytes in which its three bits lie.
    const __m512i octets = _mm512_set_epi32(pair(5), pair(5), pair(4), pair(4), pair(4), pair(3),
                                            pair(3), pair(3), pair(2), pair(2), pair(1), pair(1),
                                            pair(1), pair(0), pair(0), pair(0));
    const __m512i shift = _mm512_set_epi32(5, 2, 7, 4, 1, 6, 3, 0, 5, 2, 7, 4, 1, 6, 3, 0);
    return _mm512_srlv_epi32(_mm512_shuffle_epi8(both, octets), shift);
  }

  // Control of a shuffle: bytes k and k + 1, then zeros.
  static constexpr int pair(int k) { return static_cast<int>(0x80800000u) | (k + 1) << 8 | k; }

  // Lanes in the order of columns.
  static V natural(V v) {
    if (Bits != 4) return v;
    const __m512i place = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutexvar_ps(place, v);
  }
};

// Codes of 5, 6 and 7 bits: each lane takes the two bytes in which its bits lie.
template <int Bits>
struct Windows : Wide {
  using Group = Affine;
  static constexpr int unit = 16, vectors = 1, bytes = 2 * Bits, reach = 16;

  static Group group(const Centred& row, int64_t g) { return {row, g}; }

  static constexpr int pair(int lane) {
    const int k = lane * Bits / 8;
    return static_cast<int>(0x80800000u) | (k + 1) << 8 | k;
  }
  static constexpr int skip(int lane) { return lane * Bits % 8; }

  static __m512i words(const uint8_t* codes) {
    const __m512i both = _mm512_broadcast_i32x4(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512i octets = _mm512_set_epi32(
        pair(15), pair(14), pair(13), pair(12), pair(11), pair(10), pair(9), pair(8), pair(7),
        pair(6), pair(5), pair(4), pair(3), pair(2), pair(1), pair(0));
    const __m512i shift = _mm512_set_epi32(
        skip(15), skip(14), skip(13), skip(12), skip(11), skip(10), skip(9), skip(8), skip(7),
        skip(6), skip(5), skip(4), skip(3), skip(2), skip(1), skip(0));
    return _mm512_srlv_epi32(_mm512_shuffle_epi8(both, octets), shift);
  }

  static void weights(const uint8_t* codes, const Group& group, V* out) {
    const __m512i last = _mm512_set1_epi32((1 << Bits) - 1);
    out[0] = group.weights(_mm512_and_si512(words(codes), last));
  }
};

// The 32 values of a group in two registers, between which the fifth bit chooses.
struct Twice : Windows<5> {
  struct Group {
    __m512 low, high;
  };

  static Group group(const Centred& row, int64_t g) {
    const __m512 lane = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const Affine by(row, g);
    return {by.weights(lane), by.weights(_mm512_add_ps(lane, _mm512_set1_ps(16)))};
  }

  static void weights(const uint8_t* codes, const Group& group, V* out) {
    out[0] = _mm512_permutex2var_ps(group.low, words(codes), group.high);
  }
};

struct Bytes : Wide {
  using Group = Affine;
  static constexpr int unit = 16, vectors = 1, bytes = 16, reach = 16;

  static Group group(const Centred& row, int64_t g) { return {row, g}; }

  static void weights(const uint8_t* codes, const Group& group, V* out) {
    const __m128i octets = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    out[0] = group.weights(_mm512_cvtepu8_epi32(octets));
  }
};

void arrange(const rarefy_matrix& m, const float* x, float* out, int64_t stride) {
  static constexpr uint8_t order[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  if (m.bits == 4 && fits<Table<4>>(m)) {
    arrange_units(x, m.columns, order, 16, out, stride);
  } else {
    arrange_plainly(x, m.columns, out, stride);
  }
}

void product(const IntProduct& p, int64_t row0, int64_t row1, float* scratch) {
  const bool whole = fits<Bytes>(*p.matrix);
  switch (whole ? p.matrix->bits : 0) {
    case 2:
      return product_of<Table<2>>(p, row0, row1, scratch);
    case 3:
      return product_of<Table<3>>(p, row0, row1, scratch);
    case 4:
      return product_of<Table<4>>(p, row0, row1, scratch);
    case 5:
      return product_of<Twice>(p, row0, row1, scratch);
    case 6:
      return product_of<Windows<6>>(p, row0, row1, scratch);
    case 7:
      return product_of<Windows<7>>(p, row0, row1, scratch);
    case 8:
      return product_of<Bytes>(p, row0, row1, scratch);
    default:
      return int_portable.product(p, row0, row1, scratch);
  }
}

void decode(const rarefy_matrix& m, int64_t row0, int64_t row1, float* out, float* scratch) {
  const bool whole = fits<Bytes>(m);
  switch (whole ? m.bits : 0) {
    case 2:
      return decode_rows<Table<2>>(m, row0, row1, out, scratch);
    case 3:
      return decode_rows<Table<3>>(m, row0, row1, out, scratch);
    case 4:
      return decode_rows<Table<4>>(m, row0, row1, out, scratch);
    case 5:
      return decode_rows<Twice>(m, row0, row1, out, scratch);
    case 6:
      return decode_rows<Windows<6>>(m, row0, row1, out, scratch);
    case 7:
      return decode_rows<Windows<7>>(m, row0, row1, out, scratch);
    case 8:
      return decode_rows<Bytes>(m, row0, row1, out, scratch);
    default:
      return int_portable.decode(m, row0, row1, out, scratch);
  }
}

}  // namespace

extern const IntKernels int_avx512 = {arrange, product, decode};

}  // namespace rarefy
