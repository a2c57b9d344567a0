#include "lut.h"

#ifdef __AVX2__
#include <immintrin.h>

#include <cstring>

namespace rarefy {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 8;
  using Float = __m256;
  using Word = __m256i;

  static Float zero() { return _mm256_setzero_ps(); }
  static Float spread(float value) { return _mm256_set1_ps(value); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static Word load(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static Word next(Word keys) { return _mm256_srli_epi32(keys, 4); }
  static Word load_words(const uint32_t* p, int64_t count) {
    if (count == kLanes) return load(p);
    const Word numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const Word wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), numbers);
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), wanted);
  }
  static __m128i load_halves(const void* p, int64_t count) {
    uint16_t halves[8] = {};
    std::memcpy(halves, p, static_cast<size_t>(count) * 2);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves));
  }
  static Word load_units(const int16_t* p, int64_t count) {
    const Word units = _mm256_cvtepi16_epi32(load_halves(p, count));
    return _mm256_castps_si256(_mm256_cvtepi32_ps(units));
  }
  static Word load_floats(const void* array, int32_t type, int64_t index, int64_t count) {
    if (type == RAREFY_SCALE_F32) {
      return load_words(static_cast<const uint32_t*>(array) + index, count);
    }
    const auto* place = static_cast<const uint16_t*>(array) + index;
    const __m128i half = count == kLanes
                             ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(place))
                             : load_halves(place, count);
    if (type == RAREFY_SCALE_F16) return _mm256_castps_si256(_mm256_cvtph_ps(half));
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
  }
  template <class T>
  static void store(T* p, Word value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), value);
  }
  static void store_first(float* p, Float value, int64_t count) {
    float all[kLanes];
    _mm256_storeu_ps(all, value);
    std::memcpy(p, all, static_cast<size_t>(count) * sizeof(float));
  }

  struct Table {
    Float low, high;
    explicit Table(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
    // Bits 0 to 2 choose within each half, bit 3 the half; it goes where the blend looks.
    Float at(Word keys) const {
      const Float half = _mm256_castsi256_ps(_mm256_slli_epi32(keys, 28));
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, keys),
                              _mm256_permutevar8x32_ps(high, keys), half);
    }
  };

  static void transpose(Word* r) {
    Word a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      a[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
      b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
      b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
      b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
      r[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
  }
};

}  // namespace
}  // namespace rarefy

#include "lut_blocks.inl"

const rarefy::LutTable* rarefy::lut_avx2() { return &kTable; }
#else
const rarefy::LutTable* rarefy::lut_avx2() { return nullptr; }
#endif
