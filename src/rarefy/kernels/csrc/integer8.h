// Products of grouped integers with activations rounded to int8: integer sums, then one float
// product a group. W8A8 is the case of one group a row.
//
//   y[t, i] = s_x[t] sum_g s[i, g] (sum_{j in g} q[i, j] c[t, j]  -  z[i, g] sum_{j in g} c[t, j])
//
// Where every 64 columns of a vector have a scale of their own, s_x stands inside the sum.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "scratch.h"

namespace rarefy {

struct Int8Product {
  const rarefy_matrix* matrix;
  const int8_t* x;      // [vectors, stride], as `arrange` laid it out
  const int32_t* sums;  // [vectors, stride]: the sums of c that belong to each integer lane, and
                        // from the middle on those of each group, as floats
  const int32_t* totals;  // [vectors]: the sum of all c
  const float* scale;     // [vectors]
  const float* blocks;    // [vectors, int8_blocks]: the scale of every kInputGroup columns, zeros
                          // behind them, where `scale` is 1; or null
  int64_t stride;
  int64_t vectors;  // 1, 2, 4 or 8
  float* y;         // [wanted, m]
  int64_t wanted;
};

struct Int8Kernels {
  // One vector of int8 codes c [n] in the order in which the loop meets the weights.
  void (*arrange)(const rarefy_matrix& m, const int8_t* c, int8_t* out, int32_t* sums,
                  int64_t stride);
  void (*product)(const Int8Product& p, int64_t row0, int64_t row1, float* scratch);
};

// Columns of a vector that share a scale where they do not all.
constexpr int64_t kInputGroup = 64;

// Bytes of an arranged vector, and integers of its sums; at least what every level needs.
inline int64_t int8_stride(const rarefy_matrix& m) { return 2 * ((m.columns + 127) / 128 * 128); }

// Room for the scales of a vector's columns.
inline int64_t int8_blocks(int64_t stride) { return (stride / kInputGroup + 15) / 16 * 16; }

// Where a vector's sums of each group are: floats, zeros behind them to a multiple of 16. Where
// columns have scales of their own, those are in the sums.
inline const float* sums_of_groups(const int32_t* sums, int64_t stride) {
  return reinterpret_cast<const float*>(sums + stride / 2);
}

int64_t int8_scratch(const rarefy_matrix& m);

extern const Int8Kernels int8_portable;
#if defined(RAREFY_X86)
extern const Int8Kernels int8_avx2;
extern const Int8Kernels int8_avx512;
#endif

// One vector, rounded once for all products with matrices of the same layout, on the calling thread.
class Rounded {
 public:
  // What was prepared is out of date: the vector has changed.
  void renew() { from_ = nullptr; }

  // y[0 .. row1 - row0] = rows row0 .. row1. Returns a rarefy_status.
  int product(const rarefy_matrix& m, const float* x, const float* input_scale,
              int64_t input_group, float* y, int64_t row0, int64_t row1);

 private:
  Scratch memory_;
  const float *from_ = nullptr, *given_ = nullptr;  // vector and scale, and the codes it is for
  int64_t columns_ = 0, group_ = 0, input_group_ = 0;
  int32_t bits_ = 0, zero_steps_ = 0;
};

}  // namespace rarefy
