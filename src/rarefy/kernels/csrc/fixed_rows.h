// The loop of products in fixed point: block by block of columns, a few rows at a time. A block is a
// register of codes; each lane of 16 bytes looks its integers up in a table of its own, so that a
// block may lie across groups. What depends on the instructions is a policy W:
//
//   V, I         registers of floats and of integers
//   bits         of a code; rows: taken at a time
//   lanes        of 16 bytes in a register
//   Table        what a block's integers are looked up in
//
// Parts: pieces of a block, each of which lies in one group.
#pragma once

#include <immintrin.h>

#include "convert.h"
#include "fixed.h"

namespace rarefy {
namespace {

// Parts whose parameters are kept at addresses that the compiler knows.
constexpr int kNearParts = 16;
// Bytes that a row's codes are fetched ahead; see rows.h.
constexpr int64_t kFetched = 384;

template <class W>
struct Block {
  static constexpr int bytes = 16 * W::lanes, columns = bytes * 8 / W::bits, words = 8 * W::lanes;
  static constexpr int registers = columns / words;  // of 16-bit integers
};

// Where the tables of a row's parts begin, and the powers of two that their integers are due.
struct Places {
  float* power;
  int32_t* offset;

  RAREFY_INLINE Places near(float* room, int64_t g) const {
    std::memcpy(room, power + g, kNearParts * sizeof(float));
    std::memcpy(room + kNearParts, offset + g, kNearParts * sizeof(int32_t));
    return {room, reinterpret_cast<int32_t*>(room + kNearParts)};
  }
};

inline int64_t columns_of_group(const rarefy_matrix& m, int64_t block) {
  return groups_of(m) > 1 ? m.group : round_up(m.columns, block);
}

// Floats of scratch of one row: parameters of its groups, and of parts where those are smaller.
template <class W>
int64_t fixed_room(const rarefy_matrix& m) {
  return 2 * round_up(groups_of(m), 16) + 2 * round_up(ceil_div(m.columns, 16 * 8 / W::bits), 16);
}

// How many parts of a row share a group's place. Where they are 2^shift whole blocks, a block's number
// says which; other groups have their places written out part by part.
template <class W, int Parts>
struct Share {
  static constexpr int64_t part = Block<W>::columns / Parts;
  int64_t each;
  int shift = 0;

  explicit Share(const rarefy_matrix& m) : each(columns_of_group(m, part) / part) {
    if (groups_of(m) == 1) each = int64_t{1} << 32;
    if (Parts > 1 || (each & (each - 1)) != 0) return;
    for (; each > 1; each /= 2) ++shift;
  }

  RAREFY_INLINE int64_t place(int64_t block) const {
    return Parts == 1 ? block >> shift : block * Parts;
  }
};

template <class W, int Parts>
Places places_of(const rarefy_matrix& m, int64_t row, int64_t each, float* scratch) {
  const int64_t groups = groups_of(m), own = round_up(groups, 16);
  const Places found{scratch, reinterpret_cast<int32_t*>(scratch + own)};
  W::read(m, row, found.power, found.offset);
  if (each == 1) return found;
  const int64_t parts = ceil_div(m.columns, Block<W>::columns / Parts), all = round_up(parts, 16);
  scratch += 2 * own;
  const Places spread{scratch, reinterpret_cast<int32_t*>(scratch + all)};
  int64_t at = 0;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t end = at_most(parts, at + each); at < end; ++at) {
      spread.power[at] = found.power[g];
      spread.offset[at] = found.offset[g];
    }
  }
  for (; at < all; ++at) {
    spread.power[at] = 0.0f;
    spread.offset[at] = 0;
  }
  return spread;
}

// One block of a row on top of its total.
template <class W, int Parts, class Integers>
RAREFY_INLINE inline typename W::V fixed_block(typename W::I codes, const int16_t* x,
                                               const Integers* integers, const int32_t* offset,
                                               const float* power, typename W::V total) {
  using B = Block<W>;
  const typename W::Table table = W::template table<Parts>(integers, offset);
  typename W::I high = W::none(), low = W::half();
  RAREFY_UNROLL
  for (int k = 0; k < B::registers; k += 2) {
    typename W::I weight[2];
    W::weights(codes, k / 2, table, weight);
    RAREFY_UNROLL
    for (int v = 0; v < 2; ++v) {
      const int16_t* limbs = x + 2 * (k + v) * B::words;
      high = W::dot(high, weight[v], W::load(limbs));
      low = W::dot(low, weight[v], W::load(limbs + B::words));
    }
  }
  return W::carry(high, low, W::template power<Parts>(power), total);
}

template <class W, int R, int Parts>
void fixed_of_rows(const FixedProduct& p, int64_t row0, int64_t apart, float* scratch) {
  using B = Block<W>;
  const rarefy_matrix& m = *p.matrix;
  const Share<W, Parts> share(m);
  const int64_t near_blocks = int64_t{kNearParts / Parts} << share.shift;
  const int64_t all = ceil_div(m.columns, B::columns), bytes = m.words_per_row * 4;
  const int64_t whole = at_most(all, bytes / B::bytes), room = fixed_room<W>(m);
  const uint8_t* codes[R];
  Places row[R];
  typename W::V total[R];
  RAREFY_UNROLL
  for (int r = 0; r < R; ++r) {
    codes[r] = row_codes(m, row0 + r * apart);
    row[r] = places_of<W, Parts>(m, row0 + r * apart, share.each, scratch + r * room);
    total[r] = W::zero();
  }
  const auto* integers = W::integers(m);
  for (int64_t first = 0; first < all; first += near_blocks) {
    alignas(64) float memory[R][2 * kNearParts];
    Places near[R];
    RAREFY_UNROLL
    for (int r = 0; r < R; ++r) near[r] = row[r].near(memory[r], share.place(first));
    const int64_t some = at_most(whole - first, near_blocks);
    const int16_t* x = p.x + first * 2 * B::columns;
    for (int64_t b = 0; b < some; ++b) {
      const int64_t place = share.place(b);
      RAREFY_UNROLL
      for (int r = 0; r < R; ++r) {
        const uint8_t* at = codes[r] + (first + b) * B::bytes;
        total[r] = fixed_block<W, Parts>(W::codes(at), x + b * 2 * B::columns, integers,
                                         near[r].offset + place, near[r].power + place, total[r]);
        ahead(at + kFetched);
      }
    }
    if (first + near_blocks < all || whole == all) continue;
    const int64_t b = whole - first, place = share.place(b);  // what is left of the row
    RAREFY_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename W::I last =
          W::codes(codes[r] + whole * B::bytes, static_cast<int>(bytes - whole * B::bytes));
      total[r] = fixed_block<W, Parts>(last, x + b * 2 * B::columns, integers,
                                       near[r].offset + place, near[r].power + place, total[r]);
    }
  }
  RAREFY_UNROLL
  for (int r = 0; r < R; ++r) p.y[row0 + r * apart] = W::horizontal(total[r]) * p.unit;
}

// W::rows rows at a time, and the rest one by one.
template <class W, int Parts>
void fixed_of_part(const FixedProduct& p, int64_t row0, int64_t row1, float* scratch) {
  const int64_t apart = (row1 - row0) / W::rows;
  for (int64_t i = 0; i < apart; ++i) {
    fixed_of_rows<W, W::rows, Parts>(p, row0 + i, apart, scratch);
  }
  for (row0 += W::rows * apart; row0 < row1; ++row0) {
    fixed_of_rows<W, 1, Parts>(p, row0, 1, scratch);
  }
}

template <class W>
void fixed_of(const FixedProduct& p, int64_t row0, int64_t row1, float* scratch) {
  constexpr int64_t columns = Block<W>::columns;
  const int64_t group = columns_of_group(*p.matrix, columns);
  if (group % columns == 0) return fixed_of_part<W, 1>(p, row0, row1, scratch);
  if (W::lanes == 2 || group % (columns / 2) == 0) {
    return fixed_of_part<W, 2>(p, row0, row1, scratch);
  }
  fixed_of_part<W, W::lanes>(p, row0, row1, scratch);
}

// Whether each lane of every block lies in one group, and scales are of 16 bits.
template <class W>
bool fixed_suits(const rarefy_matrix& m) {
  constexpr int64_t lane = Block<W>::columns / W::lanes;
  return m.bits == W::bits && m.scale_type != RAREFY_SCALE_F32 &&
         columns_of_group(m, lane) % lane == 0;
}

// The unit of a vector whose largest magnitude has these bits, and what turns it into steps.
struct Step {
  float unit, inverse;
  explicit Step(uint32_t largest) {
    // Below 2^-100 the inverse could not be expressed; products of such numbers are no one's.
    const int exponent = static_cast<int>(at_least(static_cast<int>(largest >> 23), 27));
    unit = bits_as<float>(static_cast<uint32_t>(exponent - 26) << 23);
    inverse = bits_as<float>(static_cast<uint32_t>(254 + 26 - exponent) << 23);
    if (largest >= 0x7F800000u) {
      unit = bits_as<float>(0x7FC00000u);
      inverse = 0.0f;
    }
  }
};

// 16-bit integers of even and of odd places, of sixteen.
inline void apart(const __m128i* from, __m128i& even, __m128i& odd) {
  const __m128i first = _mm_srai_epi32(_mm_slli_epi32(from[0], 16), 16);
  const __m128i second = _mm_srai_epi32(_mm_slli_epi32(from[1], 16), 16);
  even = _mm_packs_epi32(first, second);
  odd = _mm_packs_epi32(_mm_srai_epi32(from[0], 16), _mm_srai_epi32(from[1], 16));
}

// The limbs of one lane's columns in the order in which `weights` looks its codes up: to each of a
// block's registers eight of every (8 / Bits)-th column. `apart_by` integers from one to the next.
template <int Bits>
inline void arrange_lane(const int16_t* limbs, int16_t* out, int64_t apart_by) {
  constexpr int per = 8 / Bits;
  __m128i from[2 * per], sorted[2 * per];
  RAREFY_UNROLL
  for (int i = 0; i < 2 * per; ++i) {
    from[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(limbs + 8 * i));
  }
  RAREFY_UNROLL
  for (int i = 0; i < per; ++i) apart(from + 2 * i, sorted[i], sorted[per + i]);
  if (per == 4) {  // columns 0, 2 | 1, 3 of each four so far
    RAREFY_UNROLL
    for (int i = 0; i < 2 * per; ++i) from[i] = sorted[i];
    RAREFY_UNROLL
    for (int i = 0; i < 2; ++i) {
      apart(from + 2 * i, sorted[i], sorted[4 + i]);
      apart(from + 4 + 2 * i, sorted[2 + i], sorted[6 + i]);
    }
  }
  RAREFY_UNROLL
  for (int i = 0; i < 2 * per; ++i) {
    _mm_store_si128(reinterpret_cast<__m128i*>(out + i * apart_by), sorted[i]);
  }
}

// Limbs of the whole vector.
template <class W>
float fixed_arrange(const rarefy_matrix& m, const float* x, int16_t* out) {
  using B = Block<W>;
  constexpr int lane = B::columns / W::lanes;
  const Step step(W::largest(x, m.columns));
  for (int64_t first = 0; first < m.columns; first += B::columns, out += 2 * B::columns) {
    alignas(64) int16_t high[B::columns], low[B::columns];
    const int64_t some = at_most(B::columns, m.columns - first);
    if (some < B::columns) {
      alignas(64) float padded[B::columns] = {};
      std::memcpy(padded, x + first, static_cast<size_t>(some) * sizeof(float));
      W::split(padded, B::columns, step.inverse, high, low);
    } else {
      W::split(x + first, B::columns, step.inverse, high, low);
    }
    RAREFY_UNROLL
    for (int i = 0; i < W::lanes; ++i) {
      arrange_lane<W::bits>(high + i * lane, out + 8 * i, 2 * B::words);
      arrange_lane<W::bits>(low + i * lane, out + B::words + 8 * i, 2 * B::words);
    }
  }
  return step.unit;
}

// Every width of codes; Octets<bits> is the policy.
template <template <int> class Octets>
struct Widths {
  static bool suits(const rarefy_matrix& m) {
    return fixed_suits<Octets<4>>(m) || fixed_suits<Octets<2>>(m);
  }

  static float arrange(const rarefy_matrix& m, const float* x, int16_t* out) {
    return m.bits == 2 ? fixed_arrange<Octets<2>>(m, x, out) : fixed_arrange<Octets<4>>(m, x, out);
  }

  static void product(const FixedProduct& p, int64_t row0, int64_t row1, float* scratch) {
    if (p.matrix->bits == 2) return fixed_of<Octets<2>>(p, row0, row1, scratch);
    fixed_of<Octets<4>>(p, row0, row1, scratch);
  }
};

}  // namespace
}  // namespace rarefy
