#include "dense_rows.h"

namespace rarefy {
namespace {

template <int Kind>
struct Scalars {
  static constexpr int lanes = 8;
  struct V {
    float lane[lanes];
  };
  using Element = typename ElementOf<Kind>::Type;

  static float weight(uint16_t h) { return Kind == RAREFY_F16 ? from_f16(h) : from_bf16(h); }
  static float weight(float w) { return w; }
  static V zero() { return {}; }
  static V floats(const float* at, int64_t count) {
    V v{};
    for (int64_t k = 0; k < count; ++k) v.lane[k] = at[k];
    return v;
  }
  static V weights(const Element* at, int64_t count) {
    V v{};
    for (int64_t k = 0; k < count; ++k) v.lane[k] = weight(at[k]);
    return v;
  }
  static void store(float* at, const V& v) { std::memcpy(at, v.lane, sizeof(v.lane)); }
  static V fma(const V& a, const V& b, V c) {
    for (int k = 0; k < lanes; ++k) c.lane[k] += a.lane[k] * b.lane[k];
    return c;
  }
  static float horizontal(const V& v) {
    float sum = 0.0f;
    for (float lane : v.lane) sum += lane;
    return sum;
  }
};

}  // namespace

extern const DenseKernels dense_portable = {product_by_kind<Scalars>, decode_by_kind<Scalars>};

}  // namespace rarefy
