// Low and high bytes of 64 integers are looked up at once, and their sums taken by VNNI.

#include <immintrin.h>

#include "fixed_rows.h"

namespace rarefy {
namespace {

template <int Bits>
struct Octets {
  using V = __m512;
  using I = __m512i;
  struct Table {
    __m512i low, high;
  };
  static constexpr int bits = Bits, rows = 4, lanes = 4;

  static V zero() { return _mm512_setzero_ps(); }
  static I none() { return _mm512_setzero_si512(); }
  static I load(const int16_t* at) { return _mm512_load_si512(at); }
  static I codes(const uint8_t* at) { return _mm512_loadu_si512(at); }
  static I codes(const uint8_t* at, int bytes) {
    return _mm512_maskz_loadu_epi8(~(~uint64_t{0} << bytes), at);
  }
  static I dot(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static float horizontal(V v) { return _mm512_reduce_add_ps(v); }

  // Low limbs are due 2^-14 of what high ones are. Where integers are large, as those of 4 bits are, a
  // quarter of the low sum's upper half will do.
  static constexpr bool folded = Bits == 4;
  static I half() { return _mm512_set1_epi32(folded ? 1 << 15 : 0); }
  static V carry(I high, I low, V power, V total) {
    if (folded) {
      const I sum = _mm512_dpwssd_epi32(high, low, _mm512_set1_epi32(4 << 16));
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), power, total);
    }
    const V due = _mm512_set1_ps(1.0f / (1 << kLimb));
    const V sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), due, _mm512_cvtepi32_ps(high));
    return _mm512_fmadd_ps(sum, power, total);
  }

  // A number for each of a block's parts.
  template <int Parts>
  static V power(const float* at) {
    V found = _mm512_set1_ps(at[0]);
    if (Parts == 2) return _mm512_mask_broadcastss_ps(found, 0xFF00, _mm_load_ss(at + 1));
    if (Parts == 4) {
      found = _mm512_mask_broadcastss_ps(found, 0x00F0, _mm_load_ss(at + 1));
      found = _mm512_mask_broadcastss_ps(found, 0x0F00, _mm_load_ss(at + 2));
      found = _mm512_mask_broadcastss_ps(found, 0xF000, _mm_load_ss(at + 3));
    }
    return found;
  }

  static const uint8_t* integers(const rarefy_matrix& m) { return bytes_of_mantissas(m.scale_type); }

  template <int Parts>
  static Table table(const uint8_t* integers, const int32_t* offset) {
    return {bytes<Parts>(integers, offset), bytes<Parts>(integers + 32, offset)};
  }

  template <int Parts>
  static I bytes(const uint8_t* from, const int32_t* offset) {
    I found = _mm512_broadcast_i32x4(sixteen(from + offset[0]));
    if (Parts == 2) return _mm512_mask_broadcast_i32x4(found, 0xFF00, sixteen(from + offset[1]));
    if (Parts == 4) {
      found = _mm512_mask_broadcast_i32x4(found, 0x00F0, sixteen(from + offset[1]));
      found = _mm512_mask_broadcast_i32x4(found, 0x0F00, sixteen(from + offset[2]));
      found = _mm512_mask_broadcast_i32x4(found, 0xF000, sixteen(from + offset[3]));
    }
    return found;
  }

  static __m128i sixteen(const uint8_t* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  }

  // Integers of the codes that begin at bit k * Bits of each byte.
  static void weights(I codes, int k, const Table& table, I* out) {
    const I shifted = k == 0 ? codes : _mm512_srli_epi16(codes, static_cast<unsigned>(k * Bits));
    const I index = _mm512_and_si512(shifted, _mm512_set1_epi8((1 << Bits) - 1));
    const I low = _mm512_shuffle_epi8(table.low, index);
    const I high = _mm512_shuffle_epi8(table.high, index);
    out[0] = _mm512_unpacklo_epi8(low, high);
    out[1] = _mm512_unpackhi_epi8(low, high);
  }

  // Sixteen groups at a time; what is past the end is masked.
  static void read(const rarefy_matrix& m, int64_t row, float* power, int32_t* offset) {
    const int64_t groups = groups_of(m), at = row * Bits;
    const bool half = m.scale_type == RAREFY_SCALE_F16, packed = !m.symmetric && m.zeros != nullptr;
    const uint16_t* scales = static_cast<const uint16_t*>(m.scales) + row * groups;
    const uint32_t* words = static_cast<const uint32_t*>(m.zeros) + (packed ? at / 32 * groups : 0);
    const __m128i down = _mm_cvtsi32_si128(static_cast<int>(at % 32));
    const __m128i skip = _mm_cvtsi32_si128(half ? 13 : 16);
    const I mantissas = _mm512_set1_epi32(half ? 1023 : 127), first = _mm512_set1_epi32(15);
    const I exponents = _mm512_set1_epi32(static_cast<int>(0xFF800000u));
    const V unit = _mm512_set1_ps(half ? (1 << kLimb) / 1024.0f : (1 << kLimb) / 128.0f);
    I zero = _mm512_set1_epi32(1 << (Bits - 1));
    for (int64_t g = 0; g < groups; g += 16) {
      const __mmask16 some = static_cast<__mmask16>((1u << at_most(16, groups - g)) - 1);
      const __m256i stored = _mm256_maskz_loadu_epi16(some, scales + g);
      const I scale = half ? _mm512_castps_si512(_mm512_cvtph_ps(stored))
                           : _mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16);
      if (packed) {
        const I word = _mm512_srl_epi32(_mm512_maskz_loadu_epi32(some, words + g), down);
        zero = _mm512_and_si512(word, _mm512_set1_epi32((1 << Bits) - 1));
      }
      const I mantissa = _mm512_and_si512(_mm512_srl_epi32(scale, skip), mantissas);
      const I begin = _mm512_sub_epi32(_mm512_slli_epi32(mantissa, 6), zero);
      const V exponent = _mm512_castsi512_ps(_mm512_and_si512(scale, exponents));
      _mm512_storeu_si512(offset + g, _mm512_add_epi32(begin, first));
      _mm512_storeu_ps(power + g, _mm512_mul_ps(exponent, unit));
    }
  }

  // Bits of the largest magnitude.
  static uint32_t largest(const float* x, int64_t count) {
    const I magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    I most = _mm512_setzero_si512();
    for (int64_t j = 0; j < count; j += 16) {
      const __mmask16 some = static_cast<__mmask16>((1u << at_most(16, count - j)) - 1);
      const I bits = _mm512_maskz_loadu_epi32(some, x + j);
      most = _mm512_max_epu32(most, _mm512_and_si512(bits, magnitude));
    }
    return _mm512_reduce_max_epu32(most);
  }

  static void split(const float* x, int count, float inverse, int16_t* high, int16_t* low) {
    const V by = _mm512_set1_ps(inverse);
    const I half = _mm512_set1_epi32(1 << (kLimb - 1));
    for (int j = 0; j < count; j += 16) {
      const I all = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + j), by));
      const I upper = _mm512_srai_epi32(_mm512_add_epi32(all, half), kLimb);
      const I lower = _mm512_sub_epi32(all, _mm512_slli_epi32(upper, kLimb));
      _mm256_store_si256(reinterpret_cast<__m256i*>(high + j), _mm512_cvtepi32_epi16(upper));
      _mm256_store_si256(reinterpret_cast<__m256i*>(low + j), _mm512_cvtepi32_epi16(lower));
    }
  }
};

}  // namespace

extern const FixedKernels fixed_avx512 = {Widths<Octets>::suits, Widths<Octets>::arrange,
                                          Widths<Octets>::product};

}  // namespace rarefy
