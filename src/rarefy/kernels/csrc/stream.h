// Codes of one row, of any width, in order.
#pragma once

#include "convert.h"

namespace rarefy {
namespace {

class Stream {
 public:
  Stream(const uint8_t* at, int bits) : at_(at), bits_(bits), mask_((1u << bits) - 1) {}

  uint32_t next() {
    if (held_ < bits_) {
      window_ |= static_cast<uint64_t>(load<uint32_t>(at_)) << held_;
      at_ += 4;
      held_ += 32;
    }
    const uint32_t code = static_cast<uint32_t>(window_) & mask_;
    window_ >>= bits_;
    held_ -= bits_;
    return code;
  }

 private:
  const uint8_t* at_;
  const int bits_;
  const uint32_t mask_;
  uint64_t window_ = 0;
  int held_ = 0;
};

}  // namespace
}  // namespace rarefy
