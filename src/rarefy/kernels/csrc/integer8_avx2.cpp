// Products of bytes into 16 bits are exact for 4-bit codes; 8-bit codes would saturate there and
// are widened first.

#include <immintrin.h>

#include "codes_avx2.h"
#include "rows8.h"
#include "single_rows.h"

namespace rarefy {
namespace {

struct Narrow {
  using I = __m256i;
  using F = __m256;
  static constexpr int lanes = 8, bytes = 32;
  static constexpr int rows(int together) { return together == 8 ? 1 : 2; }
  static I none() { return _mm256_setzero_si256(); }
  static F load(const float* at) { return _mm256_loadu_ps(at); }
  static F zero() { return _mm256_setzero_ps(); }
  static I sums(const int32_t* at) { return whole(at); }
  static F floats(I v) { return _mm256_cvtepi32_ps(v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static I pairs(I a, I b, I sum) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

  static int32_t total(I v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
  }
  static float total(F v) { return horizontal(v); }
};

// One vector's steps: eleven instructions a row where codes have 4 bits.
struct Eight {
  using V = __m256;
  static V begin(__m256 v) { return v; }
  static float total(V v) { return horizontal(v); }
};

template <class Codes>
struct Rounded : Codes, Eight {
  using Wide = Rounded;
  static constexpr int steps = 1, octets = 64, middle = 0;
  __m256i first, second;

  explicit Rounded(const void* x)
      : first(whole(x)), second(whole(static_cast<const uint8_t*>(x) + 32)) {}

  // Sums of 64 products in eight lanes.
  __m256i sums(__m256i a, __m256i b) const {
    const __m256i four = _mm256_add_epi16(_mm256_maddubs_epi16(a, first),
                                          _mm256_maddubs_epi16(b, second));
    return _mm256_madd_epi16(four, _mm256_set1_epi16(1));
  }
  template <int P>
  V add(const uint8_t* codes, const float* scale, V sum) const {
    __m256i a, b;
    Codes::split(codes, a, b);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums(a, b)), Codes::template scales<P>(scale), sum);
  }
};

struct RoundedBytes : Eight {
  using Wide = RoundedBytes;
  static constexpr int steps = 1, bits = 8, bytes = 64, octets = 128, middle = 0;
  __m256i x[4];

  explicit RoundedBytes(const uint8_t* at)
      : x{whole(at), whole(at + 32), whole(at + 64), whole(at + 96)} {}

  __m256i pairs(const uint8_t* codes, int k) const {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * k));
    return _mm256_madd_epi16(_mm256_cvtepu8_epi16(some), x[k]);
  }
  template <int P>
  V add(const uint8_t* codes, const float* scale, V sum) const {
    const __m256i a = _mm256_add_epi32(pairs(codes, 0), pairs(codes, 1));
    const __m256i b = _mm256_add_epi32(pairs(codes, 2), pairs(codes, 3));
    const __m256 by = _mm256_broadcast_ss(scale);
    if (P == 1) return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(a, b)), by, sum);
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), by, sum);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(b), _mm256_broadcast_ss(scale + 1), sum);
  }
};

struct ByBytes : Narrow {
  static constexpr bool late = false;
  struct Q {
    __m256i first, second;
  };
  static constexpr int unit = 32, scales = 1, octets = 64;
  struct Pattern {};
  static Pattern pattern(int64_t) { return {}; }
  static F spread(const float* at, Pattern) { return _mm256_broadcast_ss(at); }
  static I spread(const int32_t* at, Pattern) { return _mm256_set1_epi32(*at); }
  static I half(const uint8_t* at) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static Q codes(const uint8_t* at) { return {half(at), half(at + 16)}; }
  static I dot(const Q& q, const int8_t* c, I sum) {
    return pairs(q.second, whole(c + 32), pairs(q.first, whole(c), sum));
  }
};

struct ByNibbles : Narrow {
  static constexpr bool late = true;
  struct Q {
    __m256i low, high;
  };
  static constexpr int unit = 64, scales = 2, octets = 64;
  using Pattern = int64_t;  // from the scale of the lower lane to that of the upper
  static Pattern pattern(int64_t many) { return many == 1 ? 1 : 0; }
  static F spread(const float* at, Pattern next) {
    return _mm256_insertf128_ps(_mm256_broadcast_ss(at), _mm_broadcast_ss(at + next), 1);
  }
  static I spread(const int32_t* at, Pattern next) {
    return _mm256_inserti128_si256(_mm256_set1_epi32(at[0]), _mm_set1_epi32(at[next]), 1);
  }
  static Q codes(const uint8_t* at) {
    Q found;
    Nibbles::split(at, found.low, found.high);
    return found;
  }
  static I dot(const Q& q, const int8_t* c, I sum) {
    return _mm256_add_epi32(sum, Rounded<Nibbles>(c).sums(q.low, q.high));
  }
};

// Activations as 16-bit integers; each sum is of the codes that meet in one lane.
void arrange_wide(const int8_t* c, int64_t columns, int16_t* out, int32_t* sums) {
  const int64_t whole = round_up(columns, 32);
  for (int64_t j = 0; j < whole; ++j) out[j] = j < columns ? c[j] : 0;
  for (int64_t j = 0; j < whole; j += 32) {
    for (int64_t k = j; k < j + 16; k += 2) {
      *sums++ = out[k] + out[k + 1] + out[k + 16] + out[k + 17];
    }
  }
}

template <class Codes>
void arrange_steps(const int8_t* c, int64_t columns, int8_t* out) {
  for (int64_t j = 0; j < columns; j += kStep) {
    for (int place = 0; place < kStep; ++place) out[j + place] = c[j + Codes::column(place)];
  }
}

bool nibbles(const rarefy_matrix& m) { return m.bits == 4 && fits8<ByNibbles>(m); }
bool bytes(const rarefy_matrix& m) { return m.bits == 8 && fits8<ByBytes>(m); }

void arrange(const rarefy_matrix& m, const int8_t* c, int8_t* out, int32_t* sums, int64_t stride) {
  if (nibbles(m)) return arrange_nibbles(c, m.columns, 32, out, sums);
  if (bytes(m)) return arrange_wide(c, m.columns, reinterpret_cast<int16_t*>(out), sums);
  if (whole_steps<Rounded<Crumbs>>(m)) return arrange_steps<Crumbs>(c, m.columns, out);
  if (whole_steps<Rounded<Threes>>(m)) return arrange_steps<Threes>(c, m.columns, out);
  if (whole_steps<Rounded<Nibbles>>(m)) return arrange_steps<Nibbles>(c, m.columns, out);
  int8_portable.arrange(m, c, out, sums, stride);
}

// The loop for one vector, if it is better than the one for several.
template <class Step>
bool singly(const Int8Product& p, int64_t row0, int64_t row1, float* scratch) {
  const rarefy_matrix& m = *p.matrix;
  if (!whole_steps<Step>(m)) return false;
  const bool better = p.blocks != nullptr || (p.vectors == 1 && groups_of(m) > 1);
  if (!better && (nibbles(m) || bytes(m))) return false;
  for (int64_t t = 0; t < p.wanted; ++t) {
    const Int8Product one = one_of(p, t);
    const SingleProduct single{&m, reinterpret_cast<const uint8_t*>(one.x),
                               sums_of_groups(one.sums, one.stride), one.blocks, one.scale[0], one.y};
    product_of_single<Step>(single, row0, row1, scratch);
  }
  return true;
}

void product(const Int8Product& p, int64_t row0, int64_t row1, float* scratch) {
  if (singly<Rounded<Crumbs>>(p, row0, row1, scratch)) return;
  if (singly<Rounded<Threes>>(p, row0, row1, scratch)) return;
  if (singly<Rounded<Nibbles>>(p, row0, row1, scratch)) return;
  if (singly<RoundedBytes>(p, row0, row1, scratch)) return;
  if (nibbles(*p.matrix)) return product8_of<ByNibbles>(p, row0, row1, scratch);
  if (bytes(*p.matrix)) return product8_of<ByBytes>(p, row0, row1, scratch);
  int8_portable.product(p, row0, row1, scratch);
}

}  // namespace

extern const Int8Kernels int8_avx2 = {arrange, product};

}  // namespace rarefy
