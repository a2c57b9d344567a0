// Codes of 2 and 3 bits index a register of eight values, codes of 4 bits two of them. For products with
// several vectors 4 bits are taken apart as bytes, less their zero point, and the scale follows once a
// group.

#include <immintrin.h>

#include "rows.h"

namespace rarefy {
namespace {

struct Narrow {
  using V = __m256;
  static constexpr int lanes = 8;
  static constexpr bool factored = false;
  static constexpr int rows(int together) { return together == 1 ? 4 : together == 8 ? 1 : 2; }
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* at) { return _mm256_loadu_ps(at); }
  static void store(float* at, V v) { _mm256_storeu_ps(at, v); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V factor(const Centred&, int64_t) { return zero(); }
  static V natural(V v) { return v; }

  static float horizontal(V v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

// What weights of a group are computed with.
struct Affine {
  __m256 scale, zero;

  Affine() = default;
  Affine(const Centred& row, int64_t g)
      : scale(_mm256_broadcast_ss(row.scale + g)), zero(_mm256_broadcast_ss(row.zero + g)) {}

  __m256 weights(__m256 codes) const { return _mm256_mul_ps(_mm256_sub_ps(codes, zero), scale); }
  __m256 weights(__m256i codes) const { return weights(_mm256_cvtepi32_ps(codes)); }
};

template <int Bits>
struct Table : Narrow {
  using Group = __m256;
  static constexpr int unit = 16, vectors = 2, bytes = 2 * Bits, reach = Bits == 3 ? 7 : bytes;

  static Group group(const Centred& row, int64_t g) {
    constexpr int last = (1 << Bits) - 1;
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return Affine(row, g).weights(_mm256_and_si256(lane, _mm256_set1_epi32(last)));
  }

  static void weights(const uint8_t* codes, Group table, V* out) {
    const __m256i step = _mm256_set_epi32(7 * Bits, 6 * Bits, 5 * Bits, 4 * Bits, 3 * Bits,
                                          2 * Bits, Bits, 0);
    for (int v = 0; v < 2; ++v) {
      const __m256i word = _mm256_set1_epi32(rarefy::load<int32_t>(codes + v * (Bits == 3 ? 3 : 0)));
      const int skip = v == 1 && Bits == 2 ? 16 : 0;
      const __m256i shift = _mm256_add_epi32(step, _mm256_set1_epi32(skip));
      out[v] = _mm256_permutevar8x32_ps(table, _mm256_srlv_epi32(word, shift));
    }
  }
};

// Sixteen values in two registers: for decoding, and for zero points between codes.
struct Halves : Narrow {
  struct Group {
    __m256 low, high;
  };
  static constexpr int unit = 16, vectors = 2, bytes = 8, reach = 8;

  static Group group(const Centred& row, int64_t g) {
    const __m256 lane = _mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0);
    const Affine by(row, g);
    return {by.weights(lane), by.weights(_mm256_add_ps(lane, _mm256_set1_ps(8)))};
  }

  static void weights(const uint8_t* codes, const Group& group, V* out) {
    const __m256i shift = _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    for (int v = 0; v < 2; ++v) {
      const __m256i word = _mm256_set1_epi32(rarefy::load<int32_t>(codes + 4 * v));
      const __m256i index = _mm256_srlv_epi32(word, shift);
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // its sign: bit 3
      out[v] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(group.low, index),
                                _mm256_permutevar8x32_ps(group.high, index), upper);
    }
  }
};

struct Nibbles : Narrow {
  using Group = __m256i;
  static constexpr bool factored = true;
  static constexpr int unit = 32, vectors = 4, bytes = 16, reach = 16;
  static constexpr int rows(int together) { return together <= 2 ? 2 : 1; }

  static Group group(const Centred& row, int64_t g) {
    return _mm256_set1_epi8(static_cast<char>(row.zero[g]));
  }

  // Codes stand in the highest octet of a word.
  static V factor(const Centred& row, int64_t g) {
    return _mm256_set1_ps(row.scale[g] / static_cast<float>(1 << 24));
  }

  static void weights(const uint8_t* codes, Group zero, V* out) {
    // Codes of even columns in the lower lane and of odd ones in the upper.
    const __m256i shift = _mm256_set_epi64x(4, 4, 0, 0), none = _mm256_setzero_si256();
    const __m256i both =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i index = _mm256_and_si256(_mm256_srlv_epi64(both, shift), _mm256_set1_epi8(15));
    const __m256i units = _mm256_sub_epi8(index, zero);
    pair(_mm256_unpacklo_epi8(none, units), out);
    pair(_mm256_unpackhi_epi8(none, units), out + 2);
  }

  // Both halves of each word as floats.
  static void pair(__m256i both, V* out) {
    out[0] = _mm256_cvtepi32_ps(_mm256_slli_epi32(both, 16));
    out[1] = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xFFFF0000)));
  }
};

// Codes of which each is computed with.
struct Computed : Narrow {
  using Group = Affine;
  static constexpr int rows(int together) { return together <= 2 ? 2 : 1; }

  static Group group(const Centred& row, int64_t g) { return {row, g}; }
};

// See the same in integer_avx512.cpp; eight codes at a time.
template <int Bits>
struct Windows : Computed {
  static constexpr int unit = 16, vectors = 2, bytes = 2 * Bits, reach = Bits + 8;

  static constexpr int pair(int lane) {
    const int k = lane * Bits / 8;
    return static_cast<int>(0x80800000u) | (k + 1) << 8 | k;
  }
  static constexpr int skip(int lane) { return lane * Bits % 8; }

  static void weights(const uint8_t* codes, const Group& group, V* out) {
    const __m256i octets = _mm256_set_epi32(pair(7), pair(6), pair(5), pair(4), pair(3), pair(2),
                                            pair(1), pair(0));
    const __m256i shift = _mm256_set_epi32(skip(7), skip(6), skip(5), skip(4), skip(3), skip(2),
                                           skip(1), skip(0));
    for (int v = 0; v < 2; ++v) {
      const __m256i eight = _mm256_set1_epi64x(rarefy::load<int64_t>(codes + v * Bits));
      const __m256i word = _mm256_srlv_epi32(_mm256_shuffle_epi8(eight, octets), shift);
      out[v] = group.weights(_mm256_and_si256(word, _mm256_set1_epi32((1 << Bits) - 1)));
    }
  }
};

struct Bytes : Computed {
  static constexpr int unit = 16, vectors = 2, bytes = 16, reach = 16;

  static void weights(const uint8_t* codes, const Group& group, V* out) {
    for (int v = 0; v < 2; ++v) {
      const __m128i octets = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * v));
      out[v] = group.weights(_mm256_cvtepu8_epi32(octets));
    }
  }
};

// Whether 4-bit codes are taken apart as bytes: groups of whole units, integer zero points.
bool by_bytes(const rarefy_matrix& m) {
  return m.bits == 4 && fits<Nibbles>(m) && zero_steps(m) == 1;
}

void arrange(const rarefy_matrix& m, const float* x, float* out, int64_t stride) {
  static constexpr uint8_t order[32] = {0,  4,  8,  12, 1,  5,  9,  13, 2,  6,  10,
                                        14, 3,  7,  11, 15, 16, 20, 24, 28, 17, 21,
                                        25, 29, 18, 22, 26, 30, 19, 23, 27, 31};
  if (by_bytes(m)) {
    arrange_units(x, m.columns, order, 32, out, stride);
  } else {
    arrange_plainly(x, m.columns, out, stride);
  }
}

void product(const IntProduct& p, int64_t row0, int64_t row1, float* scratch) {
  const rarefy_matrix& m = *p.matrix;
  switch (fits<Bytes>(m) ? m.bits : 0) {
    case 2:
      return product_of<Table<2>>(p, row0, row1, scratch);
    case 3:
      return product_of<Table<3>>(p, row0, row1, scratch);
    case 4:
      if (by_bytes(m)) return product_of<Nibbles>(p, row0, row1, scratch);
      return product_of<Halves>(p, row0, row1, scratch);
    case 5:
      return product_of<Windows<5>>(p, row0, row1, scratch);
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
  switch (fits<Bytes>(m) ? m.bits : 0) {
    case 2:
      return decode_rows<Table<2>>(m, row0, row1, out, scratch);
    case 3:
      return decode_rows<Table<3>>(m, row0, row1, out, scratch);
    case 4:
      return decode_rows<Halves>(m, row0, row1, out, scratch);
    case 5:
      return decode_rows<Windows<5>>(m, row0, row1, out, scratch);
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

extern const IntKernels int_avx2 = {arrange, product, decode};

}  // namespace rarefy
