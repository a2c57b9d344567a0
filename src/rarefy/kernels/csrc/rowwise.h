// One vector through some rows of a matrix, on the calling thread: for loops that hold their own
// threads. What is prepared from the vector is kept as long as vector and matrix allow.
#pragma once

#include <cstdint>
#include <vector>

#include "integer8.h"
#include "matrix.h"
#include "scratch.h"
#include "single.h"

namespace rarefy {

class RowWorker {
 public:
  // What was prepared is out of date: the vectors have changed.
  void renew() {
    from_ = mixed_ = nullptr;
    rounded_.renew();
  }

  // y[0 .. row1 - row0] = rows row0 .. row1 of W x. Returns a rarefy_status.
  int product(const rarefy_matrix& matrix, const float* x, float* y, int64_t row0, int64_t row1);

  // The same with the vector rounded to int8 first, as rarefy_matvec_int8 does.
  int product_int8(const rarefy_matrix& matrix, const float* x, const float* input_scale,
                   int64_t input_group, float* y, int64_t row0, int64_t row1) {
    return rounded_.product(matrix, x, input_scale, input_group, y, row0, row1);
  }

  // The same, but numbers of at least `outlier` stay as they are, and the scale is that of the others
  // (LLM.int8()). For 8-bit codes.
  int product_mixed(const rarefy_matrix& matrix, const float* x, float outlier, float* y,
                    int64_t row0, int64_t row1);

  // out[row1 - row0, n] = those rows as float32. Returns a rarefy_status.
  int decode(const rarefy_matrix& matrix, int64_t row0, int64_t row1, float* out);

 private:
  // The vector as floats, or in `single_`, whichever the product of such a matrix takes.
  const float* arrange(const rarefy_matrix& matrix, const float* x);

  Scratch arranged_, scratch_, calm_;
  Rounded rounded_;
  const float* from_ = nullptr;  // what arranged_ was made of, and for which codes
  int64_t columns_ = 0, group_ = 0;
  int32_t bits_ = 0, zero_steps_ = 0;
  SingleProduct single_{};
  const float* mixed_ = nullptr;  // what calm_ was made of: the vector without its outliers
  float outlier_ = 0.0f;
  std::vector<int64_t> apart_;  // where those are
};

// Whether there is a product for such a matrix, of a vector as it is or of a rounded one.
bool has_rows(const rarefy_matrix& matrix, bool rounded = false);

}  // namespace rarefy
