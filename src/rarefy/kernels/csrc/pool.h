// Threads for products: those of an OpenMP runtime that is in the process anyway, or our own.
//
// After each of its own parallel regions torch's OpenMP lets its threads spin for many milliseconds,
// and other threads would have to share the cores with them; see rarefy_borrow in matrix.h. Our own
// threads spin for some microseconds after each job, because the next product of a decoding step
// follows at once, and sleep after that.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace rarefy {

class Pool {
 public:
  using Body = void (*)(void* context, int64_t part, int thread);

  Pool();
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // GOMP_parallel of an OpenMP runtime, whose threads are taken from here on; null: our own.
  using Parallel = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
  static void borrow(Parallel parallel);

  // The pool of this process; made anew in a forked child, whose threads are gone.
  static Pool& shared();

  // Call body(context, part, thread) once for each part < parts on up to `threads` threads, the
  // caller among them, and return when all are done. Parts are handed out one by one; thread numbers
  // lie below `threads`. A second caller at the same time, and a call from within a body, run alone.
  void run(int threads, int64_t parts, Body body, void* context);

  // The same for a callable f(part, thread).
  template <class F>
  void each(int threads, int64_t parts, F&& f) {
    using Function = std::remove_reference_t<F>;
    run(
        threads, parts,
        [](void* context, int64_t part, int thread) {
          (*static_cast<Function*>(context))(part, thread);
        },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

  // Call f(thread) for each thread < threads, all at the same time, so that they may wait for each
  // other. False, without a call, when that cannot be had: from within a body, and while another
  // caller's job runs.
  template <class F>
  bool team(int threads, F&& f) {
    using Function = std::remove_reference_t<F>;
    return together(
        threads,
        [](void* context, int64_t part, int) {
          (*static_cast<Function*>(context))(static_cast<int>(part));
        },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  struct State;
  bool together(int threads, Body body, void* context);
  std::unique_ptr<State> state_;
};

}  // namespace rarefy
