// One vector of int8 activations times codes of 2, 3, 4 or 8 bits whose groups are whole steps of 64:
// what a token of decoding takes most. A step is eleven instructions a row where codes have 4 bits.
// Scales, zero points and the scales of the vector's columns meet before it, eight groups at a time.
#pragma once

#include <immintrin.h>

#include "convert.h"
#include "integer8.h"

namespace rarefy {
namespace {

inline __m256i whole(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

inline float horizontal(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Sums of 64 products in eight lanes. `bytes` are those of the codes, `octets` those of the vector.
// Codes of few bits are bytes of two registers, in an order that is cheap to make; `column` says which
// of the 64 columns each of them is.
struct Halves {
  static constexpr int octets = 64;
  __m256i first, second;

  explicit Halves(const int8_t* x) : first(whole(x)), second(whole(x + 32)) {}

  __m256i sums(__m256i a, __m256i b) const {
    const __m256i four = _mm256_add_epi16(_mm256_maddubs_epi16(a, first),
                                          _mm256_maddubs_epi16(b, second));
    return _mm256_madd_epi16(four, _mm256_set1_epi16(1));
  }
};

struct StepOfCrumbs : Halves {
  static constexpr int bits = 2, bytes = 16;
  using Halves::Halves;

  static int column(int place) { return place % 16 * 4 + place / 16; }

  __m256i dot(const uint8_t* codes) const {
    const __m256i mask = _mm256_set1_epi8(3), low = _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0),
                  high = _mm256_set_epi32(6, 6, 6, 6, 4, 4, 4, 4);
    const __m256i all =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return sums(_mm256_and_si256(_mm256_srlv_epi32(all, low), mask),
                _mm256_and_si256(_mm256_srlv_epi32(all, high), mask));
  }
};

// Four codes are 12 bits. Two bytes that hold them go into 16 bits, from the fifth bit of those on.
struct StepOfThrees : Halves {
  static constexpr int bits = 3, bytes = 24;
  using Halves::Halves;

  static int column(int place) { return place % 32 / 2 * 4 + place / 32 * 2 + place % 2; }

  __m256i dot(const uint8_t* codes) const {
    const auto sixteen = [](const uint8_t* at) RAREFY_INLINE {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    };
    // The second half of the codes begins at byte 12, which the upper lane has as its fifth.
    const __m256i order = _mm256_set_epi8(15, 14, 14, 13, 12, 11, 11, 10, 9, 8, 8, 7, 6, 5, 5, 4,
                                          11, 10, 10, 9, 8, 7, 7, 6, 5, 4, 4, 3, 2, 1, 1, 0);
    const __m256i raise = _mm256_set1_epi32(0x00010010), low = _mm256_set1_epi16(0x0007),
                  high = _mm256_set1_epi16(0x0700);
    const __m256i some =
        _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(codes)), sixteen(codes + 8), 1);
    const __m256i v = _mm256_mullo_epi16(_mm256_shuffle_epi8(some, order), raise);
    return sums(_mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(v, 4), low),
                                _mm256_and_si256(_mm256_slli_epi16(v, 1), high)),
                _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(v, 10), low),
                                _mm256_and_si256(_mm256_srli_epi16(v, 5), high)));
  }
};

struct StepOfNibbles : Halves {
  static constexpr int bits = 4, bytes = 32;
  using Halves::Halves;

  static __m256i low(__m256i both) { return _mm256_and_si256(both, _mm256_set1_epi8(15)); }
  static __m256i high(__m256i both) { return low(_mm256_srli_epi16(both, 4)); }

  __m256i dot(const uint8_t* codes) const {
    const __m256i both = whole(codes);
    return sums(low(both), high(both));
  }
};

struct StepOfBytes {
  static constexpr int bits = 8, bytes = 64, octets = 128;
  __m256i x[4];

  explicit StepOfBytes(const int8_t* at)
      : x{whole(at), whole(at + 32), whole(at + 64), whole(at + 96)} {}

  static __m256i pairs(const uint8_t* codes, __m256i x) {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return _mm256_madd_epi16(_mm256_cvtepu8_epi16(some), x);
  }
  __m256i dot(const uint8_t* codes) const {
    return _mm256_add_epi32(_mm256_add_epi32(pairs(codes, x[0]), pairs(codes + 16, x[1])),
                            _mm256_add_epi32(pairs(codes + 32, x[2]), pairs(codes + 48, x[3])));
  }
};

template <class Step>
class Single8 {
 public:
  static bool fits(const rarefy_matrix& m) {
    return m.bits == Step::bits && m.columns % kUnit == 0 &&
           (groups_of(m) == 1 || m.group % kUnit == 0);
  }

  explicit Single8(const Int8Product& p)
      : p_(p),
        m_(*p.matrix),
        groups_(groups_of(m_)),
        each_((groups_ > 1 ? m_.group : m_.columns) / kUnit),
        units_(m_.columns / kUnit),
        room_(round_up(units_, 8) + 8),
        codes_(sums_of_groups(p.sums, p.stride)),
        zeros_(m_.symmetric ? nullptr : static_cast<const int32_t*>(m_.zeros)) {
    alignas(32) static const int32_t edge[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    last_ = whole(edge + 8 - groups_ % 8);
  }

  // Rows that are multiplied together lie far apart, so that each is a stream of its own.
  void part(int64_t row0, int64_t row1, float* scratch) const {
    const int64_t apart = (row1 - row0) / 4;
    for (const int64_t end = row0 + apart; row0 < end; ++row0) rows<4>(row0, apart, scratch);
    for (row0 += 3 * apart; row0 < row1; ++row0) rows<1>(row0, 1, scratch);
  }

 private:
  static constexpr int64_t kUnit = 64;
  static constexpr int64_t kAhead = 384;  // bytes that a row's codes are fetched ahead

  // Eight scales, of which those behind the matrix's last are zeros.
  __m256 scales(int64_t at) const {
    const int64_t left = m_.rows * groups_ - at;
    if (m_.scale_type == RAREFY_SCALE_F32) {
      const float* from = static_cast<const float*>(m_.scales) + at;
      return left < 8 ? _mm256_maskload_ps(from, last_) : _mm256_loadu_ps(from);
    }
    const uint16_t* from = static_cast<const uint16_t*>(m_.scales) + at;
    uint16_t some[8] = {};
    if (left < 8) {
      std::memcpy(some, from, static_cast<size_t>(2 * left));
      from = some;
    }
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (m_.scale_type == RAREFY_SCALE_F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }

  // Eight words, or those of the last groups.
  __m256i words(const int32_t* at, bool all) const {
    return all ? whole(at) : _mm256_maskload_epi32(at, last_);
  }
  static __m128i count(int64_t bits) { return _mm_cvtsi32_si128(static_cast<int>(bits)); }

  // Writes the scale of every step of a row; returns what the zero points add to its sum.
  __m256 open(int64_t row, float* scale) const {
    const int64_t at = row * Step::bits, shift = at % 32;
    const int32_t* zeros = zeros_ == nullptr ? nullptr : zeros_ + at / 32 * groups_;
    const bool joined = shift + Step::bits > 32;  // from two words, which 3 bits may
    const __m256i mask = _mm256_set1_epi32((1 << Step::bits) - 1);
    __m256 less = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups_; g += 8) {
      const bool all = groups_ - g >= 8;
      __m256 s = scales(row * groups_ + g), zero = _mm256_set1_ps(1 << (Step::bits - 1));
      if (!all) s = _mm256_and_ps(s, _mm256_castsi256_ps(last_));
      if (zeros != nullptr) {
        __m256i codes = _mm256_srl_epi32(words(zeros + g, all), count(shift));
        if (joined) {
          const __m256i rest = words(zeros + groups_ + g, all);
          codes = _mm256_or_si256(codes, _mm256_sll_epi32(rest, count(32 - shift)));
        }
        zero = _mm256_cvtepi32_ps(_mm256_and_si256(codes, mask));
      }
      less = _mm256_fnmadd_ps(_mm256_mul_ps(s, zero), _mm256_loadu_ps(codes_ + g), less);
      if (each_ == 1) {
        if (p_.blocks) s = _mm256_mul_ps(s, _mm256_loadu_ps(p_.blocks + g));
        _mm256_storeu_ps(scale + g, s);
      } else {
        spread(s, g, at_most(groups_ - g, 8), scale);
      }
    }
    return less;
  }

  // Groups of several steps: eight scales are written at a time, those behind a group's in vain.
  void spread(__m256 scales, int64_t g, int64_t count, float* out) const {
    alignas(32) float one[8];
    _mm256_store_ps(one, scales);
    for (int64_t k = 0; k < count; ++k) {
      const __m256 scale = _mm256_broadcast_ss(one + k);
      const int64_t first = (g + k) * each_;
      for (int64_t u = first; u < first + each_; u += 8) {
        const __m256 all = p_.blocks ? _mm256_mul_ps(scale, _mm256_loadu_ps(p_.blocks + u)) : scale;
        _mm256_storeu_ps(out + u, all);
      }
    }
  }

  // Rows row0, row0 + apart ... together.
  template <int R>
  void rows(int64_t row0, int64_t apart, float* scratch) const {
    const int64_t room = room_;
    const uint8_t* codes[R];
    __m256 sum[R];
    for (int r = 0; r < R; ++r) {
      codes[r] = row_codes(m_, row0 + r * apart);
      sum[r] = open(row0 + r * apart, scratch + r * room);
    }
    for (int64_t u = 0; u < units_; ++u) {
      const Step x(p_.x + u * Step::octets);
      RAREFY_UNROLL
      for (int r = 0; r < R; ++r) {
        const uint8_t* at = codes[r] + u * Step::bytes;
        ahead(at + kAhead);
        const __m256 exact = _mm256_cvtepi32_ps(x.dot(at));
        sum[r] = _mm256_fmadd_ps(exact, _mm256_broadcast_ss(scratch + r * room + u), sum[r]);
      }
    }
    for (int r = 0; r < R; ++r) p_.y[row0 + r * apart] = horizontal(sum[r]) * p_.scale[0];
  }

  const Int8Product& p_;
  const rarefy_matrix& m_;
  const int64_t groups_, each_, units_, room_;
  const float* codes_;    // sums of the vector's codes by group
  const int32_t* zeros_;  // or null
  __m256i last_;          // lanes of the last groups, if those are no eight
};

}  // namespace
}  // namespace rarefy
