// Codes of 2 and 3 bits index a register of eight values. The sixteen values of 4-bit codes do not
// fit one: they are looked up a byte at a time as integers, and the scale's exponent follows once a
// group; which integers they are depends on its mantissa and the zero point alone.

#include <immintrin.h>

#include "mantissas.h"
#include "rows.h"

namespace rarefy {
namespace {

struct Narrow {
  using V = __m256;
  using Parameters = Affine;
  static constexpr int lanes = 8;
  static constexpr bool factored = false;
  static constexpr int rows(int together) { return together == 1 ? 4 : together == 8 ? 1 : 2; }
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* at) { return _mm256_loadu_ps(at); }
  static void store(float* at, V v) { _mm256_storeu_ps(at, v); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  template <class Parameters>
  static V factor(const Parameters&, int64_t) { return zero(); }
  static V natural(V v) { return v; }

  static float horizontal(V v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

// See the same in integer_avx512.cpp.
inline __m256 rounded(__m256 value, __m256 rounder) {
  return _mm256_fnmadd_ps(value, rounder, _mm256_fmadd_ps(value, rounder, value));
}

// Weights of eight codes.
inline __m256 values(__m256 code, const Affine& row, int64_t g) {
  const __m256 exact = _mm256_fmadd_ps(code, _mm256_broadcast_ss(row.scale + g),
                                       _mm256_broadcast_ss(row.shift + g));
  return rounded(exact, _mm256_broadcast_ss(&row.rounder));
}

template <int Bits>
struct Table : Narrow {
  using Group = __m256;
  static constexpr int unit = 16, vectors = 2, bytes = 2 * Bits, reach = Bits == 3 ? 7 : bytes;

  static Group group(const Affine& row, int64_t g) {
    constexpr int last = (1 << Bits) - 1;
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return values(_mm256_cvtepi32_ps(_mm256_and_si256(lane, _mm256_set1_epi32(last))), row, g);
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

// Sixteen values in two registers: for decoding, and for scales that are not of 16 bits.
struct Halves : Narrow {
  struct Group {
    __m256 low, high;
  };
  static constexpr int unit = 16, vectors = 2, bytes = 8, reach = 8;

  static Group group(const Affine& row, int64_t g) {
    const __m256 lane = _mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0);
    return {values(lane, row, g), values(_mm256_add_ps(lane, _mm256_set1_ps(8)), row, g)};
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

// Exponent of each group's scale, and where its values begin in the table of products.
struct Mantissas {
  const uint8_t* products;
  const float* power;
  const int32_t* offset;

  void read(const rarefy_matrix& m, int64_t row, float* scratch) {
    // Integers are read in the upper half of a word; bfloat16 is read as it is.
    const float unit = m.scale_type == RAREFY_SCALE_F16 ? 1.0f / 65536.0f : 1.0f;
    int32_t* at = reinterpret_cast<int32_t*>(scratch + round_up(groups_of(m), 16));
    read_mantissas(m, row, unit, scratch, at);
    products = products_of_mantissas(m.scale_type);
    power = scratch;
    offset = at;
  }

  using Near = Mantissas;
  RAREFY_INLINE Near near(float* room, int64_t g) const {
    std::memcpy(room, power + g, kNear * sizeof(float));
    std::memcpy(room + kNear, offset + g, kNear * sizeof(int32_t));
    return {products, room, reinterpret_cast<const int32_t*>(room + kNear)};
  }
};

template <bool Half>
struct Nibbles : Narrow {
  using Parameters = Mantissas;
  struct Group {
    __m256i low, high;
  };
  static constexpr bool factored = true;
  static constexpr int unit = 32, vectors = 4, bytes = 16, reach = 16;
  static constexpr int rows(int together) { return together <= 2 ? 2 : 1; }

  static __m256i twice(const uint8_t* at) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }

  static Group group(const Mantissas& row, int64_t g) {
    const uint8_t* at = row.products + row.offset[g];
    return {twice(at), twice(at + 32)};
  }

  static V factor(const Mantissas& row, int64_t g) { return _mm256_broadcast_ss(row.power + g); }

  static void weights(const uint8_t* codes, const Group& group, V* out) {
    // Codes of even columns in the lower lane and of odd ones in the upper.
    const __m256i shift = _mm256_set_epi64x(4, 4, 0, 0);
    const __m256i index = _mm256_and_si256(_mm256_srlv_epi64(twice(codes), shift),
                                           _mm256_set1_epi8(15));
    const __m256i low = _mm256_shuffle_epi8(group.low, index);
    const __m256i high = _mm256_shuffle_epi8(group.high, index);
    pair(_mm256_unpacklo_epi8(low, high), out);
    pair(_mm256_unpackhi_epi8(low, high), out + 2);
  }

  // Both halves of each word as floats.
  static void pair(__m256i both, V* out) {
    const __m256i even = _mm256_slli_epi32(both, 16);
    const __m256i odd = _mm256_and_si256(both, _mm256_set1_epi32(0xFFFF0000));
    out[0] = Half ? _mm256_cvtepi32_ps(even) : _mm256_castsi256_ps(even);
    out[1] = Half ? _mm256_cvtepi32_ps(odd) : _mm256_castsi256_ps(odd);
  }
};

// Scale and zero point of each group.
struct Centred {
  const float* scale;
  const int32_t* zero;
  float rounder;

  void read(const rarefy_matrix& m, int64_t row, float* scratch) {
    int32_t* at = reinterpret_cast<int32_t*>(scratch + round_up(groups_of(m), 16));
    row_scales(m, row, scratch);
    row_zeros(m, row, at);
    scale = scratch;
    zero = at;
    rounder = rounder_of(m);
  }

  using Near = Centred;
  RAREFY_INLINE Near near(float* room, int64_t g) const {
    std::memcpy(room, scale + g, kNear * sizeof(float));
    std::memcpy(room + kNear, zero + g, kNear * sizeof(int32_t));
    return {room, reinterpret_cast<const int32_t*>(room + kNear), rounder};
  }
};

// Codes of which each is computed with. `rounded` takes value * (rounder + 1) less value * rounder;
// scales of 16 bits times either factor are floats still, so the value itself is never needed.
struct Computed : Narrow {
  using Parameters = Centred;
  struct Group {
    __m256i zero;
    __m256 raised, power;
  };
  static constexpr int rows(int together) { return together <= 2 ? 2 : 1; }

  static Group group(const Centred& row, int64_t g) {
    const __m256 scale = _mm256_broadcast_ss(row.scale + g);
    return {_mm256_set1_epi32(row.zero[g]), _mm256_mul_ps(scale, _mm256_set1_ps(1 + row.rounder)),
            _mm256_mul_ps(scale, _mm256_set1_ps(row.rounder))};
  }

  static V weight(__m256i code, const Group& group) {
    const __m256 units = _mm256_cvtepi32_ps(_mm256_sub_epi32(code, group.zero));
    return _mm256_fnmadd_ps(units, group.power, _mm256_mul_ps(units, group.raised));
  }
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
      out[v] = weight(_mm256_and_si256(word, _mm256_set1_epi32((1 << Bits) - 1)), group);
    }
  }
};

struct Bytes : Computed {
  static constexpr int unit = 16, vectors = 2, bytes = 16, reach = 16;

  static void weights(const uint8_t* codes, const Group& group, V* out) {
    for (int v = 0; v < 2; ++v) {
      const __m128i octets = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * v));
      out[v] = weight(_mm256_cvtepu8_epi32(octets), group);
    }
  }
};

// Whether 4-bit codes are looked up by bytes: groups of whole units, scales of 16 bits.
bool by_bytes(const rarefy_matrix& m) {
  return m.bits == 4 && fits<Nibbles<true>>(m) && m.scale_type != RAREFY_SCALE_F32;
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
      if (!by_bytes(m)) return product_of<Halves>(p, row0, row1, scratch);
      if (m.scale_type == RAREFY_SCALE_F16) return product_of<Nibbles<true>>(p, row0, row1, scratch);
      return product_of<Nibbles<false>>(p, row0, row1, scratch);
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
