#include "sparse.h"

#ifdef __AVX2__
#include <immintrin.h>

namespace rarefy {
namespace {

// For every mask of eight lanes: which of the numbers in order each kept lane takes, and ones in the
// octets of the kept lanes.
struct Orders {
  uint8_t lane[256][8];
  uint64_t octets[256];

  constexpr Orders() : lane(), octets() {
    for (int mask = 0; mask < 256; ++mask) {
      uint8_t next = 0;
      for (int i = 0; i < 8; ++i) {
        if ((mask >> i & 1) == 0) continue;
        lane[mask][i] = next++;
        octets[mask] |= uint64_t{255} << 8 * i;
      }
    }
  }
};

constexpr Orders kOrders;

struct Simd {
  static constexpr int64_t kLanes = 8;
  using Float = __m256;

  static Float zero() { return _mm256_setzero_ps(); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float value) { _mm256_storeu_ps(p, value); }
  static float sum(Float value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static Float keep(uint32_t mask, Float value) {
    const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i spread = _mm256_set1_epi32(static_cast<int>(mask));
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(spread, places), places);
    return _mm256_and_ps(value, _mm256_castsi256_ps(kept));
  }
  template <int Type>
  static Float load_floats(const void* stream, int64_t at, int64_t count) {
    const int64_t size = Type == RAREFY_SCALE_F32 ? 4 : 2;
    const auto* place = static_cast<const char*>(stream) + at * size;
    char copy[32] = {};
    if (count < kLanes) {
      std::memcpy(copy, place, static_cast<size_t>(count * size));
      place = copy;
    }
    if (Type == RAREFY_SCALE_F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(place));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(place));
    if (Type == RAREFY_SCALE_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  template <int Type>
  static Float expand(const void* stream, int64_t at, uint32_t mask, int64_t total) {
    const Float values = load_floats<Type>(stream, at, total - at < 8 ? total - at : 8);
    const auto* order = reinterpret_cast<const __m128i*>(kOrders.lane[mask]);
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(order));
    return keep(mask, _mm256_permutevar8x32_ps(values, lanes));
  }

  struct Group {
    Float zero, scale;
  };
  static Group group(float zero, float scale) {
    return {_mm256_set1_ps(zero), _mm256_set1_ps(scale)};
  }
  // One instruction takes the next codes apart and deals them out to the octets of the kept lanes.
  static Float decode(const CodeStream& stream, const Group& group, uint32_t mask) {
    const uint64_t octets = _pdep_u64(stream.window(), kOrders.octets[mask] & stream.ones());
    const __m128i eight = _mm_cvtsi64_si128(static_cast<int64_t>(octets));
    const Float codes = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight));
    return keep(mask, _mm256_mul_ps(_mm256_sub_ps(codes, group.zero), group.scale));
  }
};

}  // namespace
}  // namespace rarefy

#include "sparse_rows.inl"

const rarefy::SparseTable* rarefy::sparse_avx2() { return &kTable; }
#else
const rarefy::SparseTable* rarefy::sparse_avx2() { return nullptr; }
#endif
