#include "lut.h"

#ifdef __AVX512F__
#include <immintrin.h>

namespace rarefy {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 16;
  using Float = __m512;
  using Word = __m512i;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float spread(float value) { return _mm512_set1_ps(value); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  static Word load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Word next(Word keys) { return _mm512_srli_epi32(keys, 4); }
  static __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
  static Word load_words(const uint32_t* p, int64_t count) {
    return _mm512_maskz_loadu_epi32(first(count), p);
  }
  static Word load_units(const int16_t* p, int64_t count) {
    const __m256i units = _mm256_maskz_loadu_epi16(first(count), p);
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(units)));
  }
  static Word load_floats(const void* array, int32_t type, int64_t index, int64_t count) {
    if (type == RAREFY_SCALE_F32) {
      return load_words(static_cast<const uint32_t*>(array) + index, count);
    }
    const auto* place = static_cast<const uint16_t*>(array) + index;
    const __m256i half = _mm256_maskz_loadu_epi16(first(count), place);
    if (type == RAREFY_SCALE_F16) return _mm512_castps_si512(_mm512_cvtph_ps(half));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  }
  template <class T>
  static void store(T* p, Word value) { _mm512_storeu_si512(p, value); }
  static void store_first(float* p, Float value, int64_t count) {
    _mm512_mask_storeu_ps(p, first(count), value);
  }

  struct Table {
    Float entries;
    explicit Table(const float* p) : entries(_mm512_loadu_ps(p)) {}
    // The instruction reads the lowest four bits of each lane only.
    Float at(Word keys) const { return _mm512_permutexvar_ps(keys, entries); }
  };

  static void transpose(Word* r) {
    Word a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
      a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
      b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
      b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
      b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
      a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
      a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
      a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    }
  }
};

}  // namespace
}  // namespace rarefy

#include "lut_blocks.inl"

const rarefy::LutTable* rarefy::lut_avx512() { return &kTable; }
#else
const rarefy::LutTable* rarefy::lut_avx512() { return nullptr; }
#endif
