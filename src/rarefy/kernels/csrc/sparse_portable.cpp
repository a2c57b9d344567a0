#include "sparse.h"

namespace rarefy {
namespace {

// Vectors of one lane.
struct Simd {
  static constexpr int64_t kLanes = 1;
  using Float = float;

  static Float zero() { return 0.0f; }
  static Float add(Float a, Float b) { return a + b; }
  static Float multiply_add(Float a, Float b, Float c) { return a * b + c; }
  static Float load(const float* p) { return *p; }
  static void store(float* p, Float value) { *p = value; }
  static float sum(Float value) { return value; }
  template <int Type>
  static Float expand(const void* stream, int64_t at, uint32_t mask, int64_t) {
    if (!mask) return 0.0f;
    if (Type == RAREFY_SCALE_F32) return rarefy::load<float>(static_cast<const float*>(stream) + at);
    const auto bits = rarefy::load<uint16_t>(static_cast<const uint16_t*>(stream) + at);
    return Type == RAREFY_SCALE_F16 ? from_f16(bits) : from_bf16(bits);
  }

  struct Group {
    float zero, scale;
  };
  static Group group(float zero, float scale) {
    return {zero, scale};
  }
  static Float decode(const CodeStream& stream, const Group& group, uint32_t mask) {
    if (!mask) return 0.0f;
    const auto code = static_cast<float>(stream.window() & ((1u << stream.bits) - 1));
    return group.scale * (code - group.zero);
  }
};

}  // namespace
}  // namespace rarefy

#include "sparse_rows.inl"

const rarefy::SparseTable* rarefy::sparse_portable() { return &kTable; }
