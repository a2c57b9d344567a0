// A place where threads wait for each other without sleeping.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace rarefy {

class Barrier {
 public:
  // Returns when `threads` threads have called it.
  void wait(int threads) {
    if (threads == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        std::this_thread::yield();  // the thread that is missing may need this core
      }
    }
  }

 private:
  static constexpr int kSpins = 4096;

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace rarefy
