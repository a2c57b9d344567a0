// Memory for a call that lives on for the next one: a block for each calling thread that only grows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace rarefy {

class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { std::free(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least `bytes` bytes, aligned to a cache line; what they held before is lost.
  void* take(int64_t bytes) {
    const std::size_t wanted = (static_cast<std::size_t>(bytes) + 63) / 64 * 64;
    if (wanted > size_) {
      std::free(block_);
      block_ = std::aligned_alloc(64, wanted);
      size_ = block_ == nullptr ? 0 : wanted;
      if (block_ == nullptr) throw std::bad_alloc();
    }
    return block_;
  }

 private:
  void* block_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace rarefy
