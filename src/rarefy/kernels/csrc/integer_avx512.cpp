// Codes of 2, 3 and 4 bits index a register that holds the values of their group; the instruction
// reads four bits of each index, so shifted codes need no mask. Codes of 8 bits are converted.

#include <immintrin.h>

#include "rows.h"

namespace rarefy {
namespace {

// Affine, sixteen groups at a time; reads past the last group go to what the mask leaves out.
struct AffineWide : Affine {
  void read(const rarefy_matrix& m, int64_t row, float* scratch) {
    const int64_t groups = groups_of(m);
    const bool packed = !m.symmetric && m.zeros != nullptr;
    const bool crossing = packed && row * m.bits % 32 + m.bits > 32;
    if (m.scale_type == RAREFY_SCALE_F32 || crossing) return Affine::read(m, row, scratch);
    float* s = scratch;
    float* b = scratch + round_up(groups, 16);
    const uint16_t* halves = static_cast<const uint16_t*>(m.scales) + row * groups;
    const int64_t at = row * m.bits;
    const uint32_t* words = static_cast<const uint32_t*>(m.zeros) + (packed ? at / 32 * groups : 0);
    const __m128i down = _mm_cvtsi32_si128(static_cast<int>(at % 32));
    const __m512i mask = _mm512_set1_epi32((1 << m.bits) - 1);
    __m512 zero = _mm512_set1_ps(static_cast<float>(1 << (m.bits - 1)));
    for (int64_t g = 0; g < groups; g += 16) {
      const __mmask16 some = static_cast<__mmask16>((1u << at_most(16, groups - g)) - 1);
      const __m256i half = _mm256_maskz_loadu_epi16(some, halves + g);
      const __m512 value = m.scale_type == RAREFY_SCALE_F16
                               ? _mm512_cvtph_ps(half)
                               : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      if (packed) {
        const __m512i word = _mm512_maskz_loadu_epi32(some, words + g);
        zero = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(word, down), mask));
      }
      _mm512_storeu_ps(s + g, value);
      _mm512_storeu_ps(b + g, _mm512_fnmadd_ps(value, zero, _mm512_setzero_ps()));
    }
    scale = s;
    shift = b;
    rounder = rounder_of(m);
  }
};

struct Wide {
  using V = __m512;
  using Parameters = AffineWide;
  static constexpr int lanes = 16;
  static constexpr bool factored = false;
  static constexpr int rows(int together) { return together == 8 ? 2 : 4; }
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* at) { return _mm512_loadu_ps(at); }
  static void store(float* at, V v) { _mm512_storeu_ps(at, v); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V factor(const Affine&, int64_t) { return zero(); }
  static V natural(V v) { return v; }
  static float horizontal(V v) { return _mm512_reduce_add_ps(v); }
};

// As round_to in convert.h does, for products of a stored scale and an integer of at most 8 bits:
// their lowest bits are zero, so that the sum below is rounded to a multiple of the wanted unit even
// where it reaches the next power of two.
inline __m512 rounded(__m512 value, __m512 rounder) {
  return _mm512_fnmadd_ps(value, rounder, _mm512_fmadd_ps(value, rounder, value));
}

template <int Bits>
struct Table : Wide {
  using Group = __m512;
  static constexpr int unit = 16, vectors = 1, bytes = 2 * Bits, reach = Bits == 3 ? 8 : bytes;

  static Group group(const Affine& row, int64_t g) {
    constexpr int last = (1 << Bits) - 1;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 code = _mm512_cvtepi32_ps(_mm512_and_si512(lane, _mm512_set1_epi32(last)));
    const __m512 exact =
        _mm512_fmadd_ps(code, _mm512_set1_ps(row.scale[g]), _mm512_set1_ps(row.shift[g]));
    return rounded(exact, _mm512_set1_ps(row.rounder));
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
  struct Group {
    __m512 scale, shift, rounder;
  };
  static constexpr int unit = 16, vectors = 1, bytes = 2 * Bits, reach = 16;

  static Group group(const Affine& row, int64_t g) {
    return {_mm512_set1_ps(row.scale[g]), _mm512_set1_ps(row.shift[g]),
            _mm512_set1_ps(row.rounder)};
  }

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
    const __m512 code = _mm512_cvtepi32_ps(_mm512_and_si512(words(codes), last));
    out[0] = rounded(_mm512_fmadd_ps(code, group.scale, group.shift), group.rounder);
  }
};

// The 32 values of a group in two registers, between which the fifth bit chooses.
struct Twice : Windows<5> {
  struct Group {
    __m512 low, high;
  };

  static Group group(const Affine& row, int64_t g) {
    const __m512 lane = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 scale = _mm512_set1_ps(row.scale[g]), shift = _mm512_set1_ps(row.shift[g]);
    const __m512 upper = _mm512_add_ps(lane, _mm512_set1_ps(16)), by = _mm512_set1_ps(row.rounder);
    return {rounded(_mm512_fmadd_ps(lane, scale, shift), by),
            rounded(_mm512_fmadd_ps(upper, scale, shift), by)};
  }

  static void weights(const uint8_t* codes, const Group& group, V* out) {
    out[0] = _mm512_permutex2var_ps(group.low, words(codes), group.high);
  }
};

struct Bytes : Wide {
  struct Group {
    __m512 scale, shift, rounder;
  };
  static constexpr int unit = 16, vectors = 1, bytes = 16, reach = 16;

  static Group group(const Affine& row, int64_t g) {
    return {_mm512_set1_ps(row.scale[g]), _mm512_set1_ps(row.shift[g]),
            _mm512_set1_ps(row.rounder)};
  }

  static void weights(const uint8_t* codes, const Group& group, V* out) {
    const __m128i octets = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(octets));
    out[0] = rounded(_mm512_fmadd_ps(code, group.scale, group.shift), group.rounder);
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
