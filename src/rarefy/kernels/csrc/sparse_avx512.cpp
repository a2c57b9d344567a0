#include "sparse.h"

#ifdef __AVX512F__
#include <immintrin.h>

namespace rarefy {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 16;
  using Float = __m512;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float value) { _mm512_storeu_ps(p, value); }
  static float sum(Float value) { return _mm512_reduce_add_ps(value); }
  // A load under a mask touches no number beyond those it takes, so the end needs no care.
  template <int Type>
  static Float expand(const void* stream, int64_t at, uint32_t mask, int64_t) {
    const auto kept = static_cast<__mmask16>(mask);
    const auto count = static_cast<__mmask16>(_bzhi_u32(0xffff, __builtin_popcount(mask)));
    if (Type == RAREFY_SCALE_F32) {
      const auto* place = static_cast<const float*>(stream) + at;
      return _mm512_maskz_expand_ps(kept, _mm512_maskz_loadu_ps(count, place));
    }
    const auto* place = static_cast<const uint16_t*>(stream) + at;
    const __m256i half = _mm256_maskz_loadu_epi16(count, place);
    if (Type == RAREFY_SCALE_F16) return _mm512_maskz_expand_ps(kept, _mm512_cvtph_ps(half));
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    return _mm512_maskz_expand_ps(kept, _mm512_castsi512_ps(wide));
  }

  // Of up to 4 bits, the values of all codes.
  struct Group {
    Float table, zero, scale;
  };
  static Group group(float zero, float scale) {
    const __m512 all = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Group group = {all, _mm512_set1_ps(zero), _mm512_set1_ps(scale)};
    group.table = value(all, group);
    return group;
  }
  static Float decode(const CodeStream& stream, const Group& group, uint32_t mask) {
    const uint64_t ones = stream.ones();
    const __m128i octets =
        _mm_set_epi64x(static_cast<int64_t>(_pdep_u64(stream.window(8), ones)),
                       static_cast<int64_t>(_pdep_u64(stream.window(), ones)));
    const __m512i codes = _mm512_cvtepu8_epi32(octets);
    const Float values = stream.bits <= 4 ? _mm512_permutexvar_ps(codes, group.table)
                                          : value(_mm512_cvtepi32_ps(codes), group);
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), values);
  }
  static Float value(Float codes, const Group& group) {
    return _mm512_mul_ps(_mm512_sub_ps(codes, group.zero), group.scale);
  }
};

}  // namespace
}  // namespace rarefy

#include "sparse_rows.inl"

const rarefy::SparseTable* rarefy::sparse_avx512() { return &kTable; }
#else
const rarefy::SparseTable* rarefy::sparse_avx512() { return nullptr; }
#endif
