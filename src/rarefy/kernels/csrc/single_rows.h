// The loop of products with one vector. What a step of 64 columns is made of is a policy Step:
//
//   bits, bytes    of a code, and of the codes of a step
//   octets         bytes of the arranged vector that a step takes; it is made from their address
//   arrange        lays the vector out, see SingleKernels
//   Wide           as many steps at once as it says; those that are left over are single
//   middle         what is taken from every code in the sum itself; the rest of its zero point follows
//   V              the register of a row's sums; `begin` makes it of eight, `total` adds it up
//   add<P>(codes, scales, sum)   the sum and the step's products times their scale, or P = 2 scales of
//                                32 columns each
//
// Only for files compiled with AVX2.
#pragma once

#include <immintrin.h>

#include "convert.h"
#include "single.h"

namespace rarefy {
namespace {

inline __m256i whole(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

inline float horizontal(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Scales of a step: 2 where groups are half steps, or an odd number of them.
inline int scales_of_step(const rarefy_matrix& m) {
  return groups_of(m) == 1 || m.group % kStep == 0 ? 1 : 2;
}

template <class Step>
bool whole_steps(const rarefy_matrix& m) {
  return m.bits == Step::bits && m.columns % kStep == 0 &&
         (groups_of(m) == 1 || m.group % (kStep / 2) == 0);
}

template <class Step, int P>
class Single {
 public:
  explicit Single(const SingleProduct& p)
      : p_(p),
        m_(*p.matrix),
        groups_(groups_of(m_)),
        parts_(m_.columns / kStep * P),
        each_(groups_ > 1 ? m_.group / (kStep / P) : parts_),
        room_(round_up(parts_, 8) + 8),
        zero_bits_(zero_bits_of(m_)),
        zero_unit_(1.0f / static_cast<float>(zero_steps(m_))),
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
  static constexpr int64_t kAhead = 384;  // bytes that a row's codes are fetched ahead

  // Eight scales, of which those behind the matrix's last are zeros.
  __m256 scales(int64_t row, int64_t g) const {
    const int64_t at = row * groups_ + g, left = m_.rows * groups_ - at;
    if (m_.scale_type == RAREFY_SCALE_F32) {
      const float* from = static_cast<const float*>(m_.scales) + at;
      return left < 8 ? _mm256_maskload_ps(from, last_) : _mm256_loadu_ps(from);
    }
    const int64_t size = m_.scale_type == RAREFY_SCALE_U8 ? 1 : 2;
    const uint8_t* from = static_cast<const uint8_t*>(m_.scales) + at * size;
    uint8_t some[16] = {};
    if (left < 8 * (3 - size)) {  // sixteen bytes are read
      std::memcpy(some, from, static_cast<size_t>(at_most(left * size, 16)));
      from = some;
    }
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (m_.scale_type == RAREFY_SCALE_F16) return _mm256_cvtph_ps(stored);
    if (m_.scale_type == RAREFY_SCALE_BF16) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16));
    }
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(stored)),
                         _mm256_broadcast_ss(m_.units + row));
  }

  // Eight words, or those of the last groups.
  __m256i words(const int32_t* at, bool all) const {
    return all ? whole(at) : _mm256_maskload_epi32(at, last_);
  }
  static __m128i count(int64_t bits) { return _mm_cvtsi32_si128(static_cast<int>(bits)); }

  // Writes the scale of every part of a row; returns what the zero points add to its sum.
  __m256 open(int64_t row, float* scale) const {
    const int64_t at = row * zero_bits_, shift = at % 32;
    const int32_t* zeros = zeros_ == nullptr ? nullptr : zeros_ + at / 32 * groups_;
    const bool joined = shift + zero_bits_ > 32;  // from two words, which 3 bits may
    const __m256i mask = _mm256_set1_epi32((1 << zero_bits_) - 1);
    const __m256 unit = _mm256_set1_ps(zero_unit_), middle = _mm256_set1_ps(Step::middle);
    __m256 less = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups_; g += 8) {
      const bool all = groups_ - g >= 8;
      __m256 s = scales(row, g), zero = _mm256_set1_ps((1 << (Step::bits - 1)) - Step::middle);
      if (!all) s = _mm256_and_ps(s, _mm256_castsi256_ps(last_));
      if (zeros != nullptr) {
        __m256i codes = _mm256_srl_epi32(words(zeros + g, all), count(shift));
        if (joined) {
          const __m256i rest = words(zeros + groups_ + g, all);
          codes = _mm256_or_si256(codes, _mm256_sll_epi32(rest, count(32 - shift)));
        }
        zero = _mm256_fmsub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(codes, mask)), unit, middle);
      }
      less = _mm256_fnmadd_ps(_mm256_mul_ps(s, zero), _mm256_loadu_ps(p_.sums + g), less);
      if (each_ == 1) {
        _mm256_storeu_ps(scale + g, in_units(s, g));
      } else {
        spread(s, g, scale);
      }
    }
    return less;
  }

  // Times the units of the vector's columns, from part number `part` on.
  __m256 in_units(__m256 scales, int64_t part) const {
    if (p_.blocks == nullptr) return scales;
    __m256 units = _mm256_loadu_ps(p_.blocks + part / P);
    if (P == 2) {
      const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
      const __m256i first = _mm256_set1_epi32(static_cast<int>(part % 2));
      units = _mm256_permutevar8x32_ps(units, _mm256_srli_epi32(_mm256_add_epi32(lane, first), 1));
    }
    return _mm256_mul_ps(scales, units);
  }

  // Groups of several parts: the k-th part from group g on has the scale of group g + k / each.
  void spread(__m256 scales, int64_t g, float* out) const {
    const __m256 share = _mm256_set1_ps(1.0f / static_cast<float>(each_)), eight = _mm256_set1_ps(8);
    __m256 middle = _mm256_set_ps(7.5f, 6.5f, 5.5f, 4.5f, 3.5f, 2.5f, 1.5f, 0.5f);
    const int64_t end = at_most(parts_, (g + 8) * each_);
    for (int64_t part = g * each_; part < end; part += 8) {
      const __m256i group = _mm256_cvttps_epi32(_mm256_mul_ps(middle, share));
      const __m256 found = _mm256_permutevar8x32_ps(scales, group);
      _mm256_storeu_ps(out + part, in_units(found, part));
      middle = _mm256_add_ps(middle, eight);
    }
  }

  // Rows row0, row0 + apart ... together.
  template <int R>
  void rows(int64_t row0, int64_t apart, float* scratch) const {
    const int64_t steps = parts_ / P;
    const uint8_t* codes[R];
    typename Step::V sum[R];
    for (int r = 0; r < R; ++r) {
      codes[r] = row_codes(m_, row0 + r * apart);
      sum[r] = Step::begin(open(row0 + r * apart, scratch + r * room_));
    }
    int64_t u = 0;
    for (; u + Step::Wide::steps <= steps; u += Step::Wide::steps) {
      take<typename Step::Wide>(codes, u, scratch, sum);
    }
    for (; u < steps; ++u) take<Step>(codes, u, scratch, sum);
    for (int r = 0; r < R; ++r) p_.y[row0 + r * apart] = Step::total(sum[r]) * p_.scale;
  }

  // Step number u, and those that S takes with it, of every row.
  template <class S, int R>
  RAREFY_INLINE void take(const uint8_t* const (&codes)[R], int64_t u, const float* scale,
                          typename Step::V (&sum)[R]) const {
    const S x(p_.x + u * Step::octets);
    RAREFY_UNROLL
    for (int r = 0; r < R; ++r) {
      const uint8_t* at = codes[r] + u * Step::bytes;
      if (Step::bytes * S::steps > 32 || u % 2 == 0) ahead(at + kAhead);  // once a cache line
      sum[r] = x.template add<P>(at, scale + r * room_ + u * P, sum[r]);
    }
  }

  const SingleProduct& p_;
  const rarefy_matrix& m_;
  const int64_t groups_, parts_, each_, room_;
  const int zero_bits_;
  const float zero_unit_;
  const int32_t* zeros_;  // or null
  __m256i last_;          // lanes of the last groups, if those are no eight
};

template <class Step>
void product_of_single(const SingleProduct& p, int64_t row0, int64_t row1, float* scratch) {
  if (scales_of_step(*p.matrix) == 1) return Single<Step, 1>(p).part(row0, row1, scratch);
  Single<Step, 2>(p).part(row0, row1, scratch);
}

// The kernels of a level, from its step for each width of codes.
template <class Two, class Three, class Four, class Bytes>
struct Widths {
  static bool suits(const rarefy_matrix& m) {
    return whole_steps<Two>(m) || whole_steps<Three>(m) || whole_steps<Four>(m) ||
           whole_steps<Bytes>(m);
  }

  static SingleProduct arrange(const rarefy_matrix& m, const float* x, void* memory) {
    switch (m.bits) {
      case 2:
        return Two::arrange(m, x, memory);
      case 3:
        return Three::arrange(m, x, memory);
      case 4:
        return Four::arrange(m, x, memory);
      default:
        return Bytes::arrange(m, x, memory);
    }
  }

  static void product(const SingleProduct& p, int64_t row0, int64_t row1, float* scratch) {
    switch (p.matrix->bits) {
      case 2:
        return product_of_single<Two>(p, row0, row1, scratch);
      case 3:
        return product_of_single<Three>(p, row0, row1, scratch);
      case 4:
        return product_of_single<Four>(p, row0, row1, scratch);
      default:
        return product_of_single<Bytes>(p, row0, row1, scratch);
    }
  }

  static constexpr SingleKernels table = {suits, arrange, product};
};

}  // namespace
}  // namespace rarefy
