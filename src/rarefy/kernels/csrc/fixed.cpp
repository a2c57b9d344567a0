// Tables of products in fixed point, and their choice.

#include "fixed.h"

#include "convert.h"
#include "dispatch.h"

namespace rarefy {
namespace {

// T significant bits are kept of (2^(T-1) + mantissa) * (-15 .. 15).
struct Products {
  uint8_t bytes[1024 * 64] = {};

  Products(int mantissas, float rounder) {
    for (int mantissa = 0; mantissa < mantissas; ++mantissa) {
      for (int k = -15; k <= 15; ++k) {
        const float exact = static_cast<float>((mantissas + mantissa) * k);
        const int value = static_cast<int>(round_to(exact, rounder));
        const uint32_t both = static_cast<uint32_t>(value);
        bytes[mantissa * 64 + 15 + k] = static_cast<uint8_t>(both);
        bytes[mantissa * 64 + 32 + 15 + k] = static_cast<uint8_t>(both >> 8);
      }
    }
  }
};

bool none(const rarefy_matrix&) { return false; }

}  // namespace

const uint8_t* bytes_of_mantissas(int scale_type) {
  static const Products half(1024, 8192.0f), bfloat(128, 65536.0f);
  return scale_type == RAREFY_SCALE_F16 ? half.bytes : bfloat.bytes;
}

const FixedKernels& fixed_kernels() {
  static const FixedKernels portable = {none, nullptr, nullptr};
#if defined(RAREFY_X86)
  return pick(&portable, &fixed_avx2, &fixed_avx512);
#else
  return portable;
#endif
}

}  // namespace rarefy
