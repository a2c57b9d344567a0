// One row of a sparse matrix, a vector of columns at a time: the mask says which lanes take the next
// numbers of the stream. The including file defines `Simd`, the vectors of its level.

#include "convert.h"
#include "sparse.h"

namespace rarefy {
namespace {

constexpr int64_t L = Simd::kLanes;
using Float = Simd::Float;

// For an octet of places, two for each of two runs of four columns: the mask of the eight columns.
struct Patterns {
  uint8_t mask[256];

  constexpr Patterns() : mask() {
    for (int octet = 0; octet < 256; ++octet) {
      const int low = 1 << (octet & 3) | 1 << (octet >> 2 & 3);
      const int high = 1 << (octet >> 4 & 3) | 1 << (octet >> 6);
      mask[octet] = static_cast<uint8_t>(low | high << 4);
    }
  }
};

constexpr Patterns kPatterns;

// What a row's products need: its mask, which is eight octets longer than the row, where its values
// begin and all values end, and its groups.
struct Row {
  uint8_t* mask;
  int64_t start, total;
  float* scale = nullptr;
  float* zero = nullptr;

  Row(const rarefy_matrix& w, int64_t row, float* scratch) {
    const auto& places = *static_cast<const rarefy_places*>(w.extra);
    const int64_t octets = ceil_div(w.columns, 8);
    mask = reinterpret_cast<uint8_t*>(scratch);
    std::memset(mask + octets, 0, 8);
    if (w.kind == RAREFY_BITMASK) {
      const auto* stream = static_cast<const uint8_t*>(places.stream);
      std::memcpy(mask, stream + row * w.words_per_row * 4, static_cast<size_t>(octets));
      start = places.starts[row];
      total = places.starts[w.rows];
    } else {
      read_places(w, row, static_cast<const uint8_t*>(places.stream), octets);
      start = row * w.columns / 2;
      total = w.rows * w.columns / 2;
    }
    if (w.bits == 0) return;
    scale = scratch + ceil_div(w.columns, 32) + 2;
    zero = scale + groups_of(w);
    row_scales(w, row, scale);
    row_zeros(w, row, zero);
  }

  void read_places(const rarefy_matrix& w, int64_t row, const uint8_t* stream, int64_t octets) {
    const int64_t first = row * w.columns, last = octets - 1;
    const uint8_t* place = stream + first / 8;
    if (first % 8 == 0) {
      for (int64_t i = 0; i < octets; ++i) mask[i] = kPatterns.mask[place[i]];
    } else {
      // Rows of 4, 12, 20 ... columns begin in the middle of an octet every second time.
      for (int64_t i = 0; i < last; ++i) {
        mask[i] = kPatterns.mask[(place[i] >> 4 | place[i + 1] << 4) & 255];
      }
      mask[last] = kPatterns.mask[place[last] >> 4];
    }
    if (w.columns % 8) mask[last] &= 15;
  }
};

// Bits `column .. column + live` of a mask.
inline uint32_t bits_at(const uint8_t* mask, int64_t column, int64_t live) {
  return load<uint32_t>(mask + column / 8) >> (column % 8) & ((1u << live) - 1);
}

// Calls sink(column, values, live) for vectors of columns from left to right. A vector never
// reaches beyond its group.
template <bool Codes, int Type, class Sink>
void walk_as(const rarefy_matrix& w, const Row& row, Sink& sink) {
  const int64_t groups = Codes ? groups_of(w) : 1, group = groups > 1 ? w.group : w.columns;
  int64_t position = row.start;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t past = at_most(w.columns, (g + 1) * group);
    const auto values = Codes ? Simd::group(row.zero[g], row.scale[g])
                              : typename Simd::Group();
    const auto step = [&](int64_t j, int64_t live) {
      const uint32_t mask = bits_at(row.mask, j, live);
      if (Codes) {
        const CodeStream stream{w.codes, w.bits, position, row.total};
        sink(j, Simd::decode(stream, values, mask), live);
      } else {
        sink(j, Simd::expand<Type>(w.codes, position, mask, row.total), live);
      }
      position += __builtin_popcount(mask);
    };
    int64_t j = g * group;
    for (; j + L <= past; j += L) step(j, L);
    if (j < past) step(j, past - j);
  }
}

template <class Sink>
void walk(const rarefy_matrix& w, const Row& row, Sink& sink) {
  if (w.bits) return walk_as<true, RAREFY_SCALE_F32>(w, row, sink);
  switch (w.scale_type) {
    case RAREFY_SCALE_F16:
      return walk_as<false, RAREFY_SCALE_F16>(w, row, sink);
    case RAREFY_SCALE_BF16:
      return walk_as<false, RAREFY_SCALE_BF16>(w, row, sink);
    default:
      return walk_as<false, RAREFY_SCALE_F32>(w, row, sink);
  }
}

struct Dot {
  const float* x;
  Float now = Simd::zero(), next = Simd::zero();  // two chains of additions, in turns

  void operator()(int64_t j, Float values, int64_t) {
    const Float sum = Simd::multiply_add(values, Simd::load(x + j), now);
    now = next;
    next = sum;
  }
};

struct Dots {
  const SparseInput& in;
  Float sums[kSparseVectors];

  void operator()(int64_t j, Float values, int64_t) {
    for (int64_t t = 0; t < in.vectors; ++t) {
      sums[t] = Simd::multiply_add(values, Simd::load(in.x + t * in.stride + j), sums[t]);
    }
  }
};

struct Store {
  float* out;
  int64_t columns;

  // What is written beyond a group is overwritten by the next one.
  void operator()(int64_t j, Float values, int64_t live) {
    if (j + L <= columns) return Simd::store(out + j, values);
    float last[L];
    Simd::store(last, values);
    for (int64_t k = 0; k < live; ++k) out[j + k] = last[k];
  }
};

void product(const rarefy_matrix& w, int64_t row, const SparseInput& in, float* y, int64_t stride,
             float* scratch) {
  const Row here(w, row, scratch);
  if (in.vectors == 1) {
    Dot dot{in.x};
    walk(w, here, dot);
    y[0] = Simd::sum(Simd::add(dot.now, dot.next));
    return;
  }
  Dots dots{in, {}};
  for (int64_t t = 0; t < in.vectors; ++t) dots.sums[t] = Simd::zero();
  walk(w, here, dots);
  for (int64_t t = 0; t < in.vectors; ++t) y[t * stride] = Simd::sum(dots.sums[t]);
}

void decode(const rarefy_matrix& w, int64_t row, float* out, float* scratch) {
  const Row here(w, row, scratch);
  Store store{out, w.columns};
  walk(w, here, store);
}

const SparseTable kTable = {product, decode};

}  // namespace
}  // namespace rarefy
