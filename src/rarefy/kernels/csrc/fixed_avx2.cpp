// Low and high bytes of 32 integers are looked up at once.

#include "fixed_rows.h"
#include "mantissas.h"

namespace rarefy {
namespace {

template <int Bits>
struct Octets {
  using V = __m256;
  using I = __m256i;
  struct Table {
    __m256i low, high;
  };
  static constexpr int bits = Bits, rows = 4, lanes = 2;

  static V zero() { return _mm256_setzero_ps(); }
  static I none() { return _mm256_setzero_si256(); }
  static I load(const int16_t* at) { return _mm256_load_si256(reinterpret_cast<const I*>(at)); }
  static I codes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const I*>(at)); }
  static I codes(const uint8_t* at, int bytes) {
    alignas(32) uint8_t some[32] = {};
    std::memcpy(some, at, static_cast<size_t>(bytes));
    return codes(some);
  }
  static I dot(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

  static float horizontal(V v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static I half() { return none(); }
  static V carry(I high, I low, V power, V total) {
    const V step = _mm256_set1_ps(1 << kLimb);
    const V sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), step, _mm256_cvtepi32_ps(low));
    return _mm256_fmadd_ps(sum, power, total);
  }

  template <int Parts>
  static V power(const float* at) {
    const V found = _mm256_broadcast_ss(at);
    return Parts == 1 ? found : _mm256_blend_ps(found, _mm256_broadcast_ss(at + 1), 0xF0);
  }

  static const uint8_t* integers(const rarefy_matrix& m) { return bytes_of_mantissas(m.scale_type); }

  template <int Parts>
  static Table table(const uint8_t* integers, const int32_t* offset) {
    return {bytes<Parts>(integers, offset), bytes<Parts>(integers + 32, offset)};
  }

  template <int Parts>
  static I bytes(const uint8_t* from, const int32_t* offset) {
    const __m128i first = sixteen(from + offset[0]);
    if (Parts == 1) return _mm256_broadcastsi128_si256(first);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first), sixteen(from + offset[1]), 1);
  }

  static __m128i sixteen(const uint8_t* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  }

  // Integers of the codes that begin at bit k * Bits of each byte.
  static void weights(I codes, int k, const Table& table, I* out) {
    const I shifted = k == 0 ? codes : _mm256_srli_epi16(codes, k * Bits);
    const I index = _mm256_and_si256(shifted, _mm256_set1_epi8((1 << Bits) - 1));
    const I low = _mm256_shuffle_epi8(table.low, index);
    const I high = _mm256_shuffle_epi8(table.high, index);
    out[0] = _mm256_unpacklo_epi8(low, high);
    out[1] = _mm256_unpackhi_epi8(low, high);
  }

  static void read(const rarefy_matrix& m, int64_t row, float* power, int32_t* offset) {
    read_mantissas(m, row, 1.0f, power, offset);
  }

  // Bits of the largest magnitude.
  static uint32_t largest(const float* x, int64_t count) {
    uint32_t most = 0;
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t bits = bits_as<uint32_t>(x[j]) & 0x7FFFFFFFu;
      most = bits > most ? bits : most;
    }
    return most;
  }

  static void split(const float* x, int count, float inverse, int16_t* high, int16_t* low) {
    const V by = _mm256_set1_ps(inverse);
    const I half = _mm256_set1_epi32(1 << (kLimb - 1));
    for (int j = 0; j < count; j += 16) {
      I upper[2], lower[2];
      RAREFY_UNROLL
      for (int i = 0; i < 2; ++i) {
        const I all = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + j + 8 * i), by));
        upper[i] = _mm256_srai_epi32(_mm256_add_epi32(all, half), kLimb);
        lower[i] = _mm256_sub_epi32(all, _mm256_slli_epi32(upper[i], kLimb));
      }
      store(high + j, _mm256_packs_epi32(upper[0], upper[1]));
      store(low + j, _mm256_packs_epi32(lower[0], lower[1]));
    }
  }

  // What was packed within lanes, in order.
  static void store(int16_t* at, I packed) {
    _mm256_store_si256(reinterpret_cast<I*>(at), _mm256_permute4x64_epi64(packed, 0b11011000));
  }
};

}  // namespace

extern const FixedKernels fixed_avx2 = {Widths<Octets>::suits, Widths<Octets>::arrange,
                                        Widths<Octets>::product};

}  // namespace rarefy
