#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace rarefy {
namespace {

using Clock = std::chrono::steady_clock;

// About as long as Python takes between two modules of a block.
constexpr auto kSpin = std::chrono::microseconds(50);

// For threads that were asked for all together, before doing without them.
constexpr auto kPatience = std::chrono::milliseconds(20);

thread_local bool inside = false;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// The word that opens and closes a job: generation, highest worker that may enter, open, workers
// that are inside. A worker that comes late finds the job closed and nobody waits for it.
constexpr uint64_t kInside = 0xFFFF;
constexpr uint64_t kOpen = 1u << 16;
constexpr int kLimit = 17, kGeneration = 32;

std::atomic<Pool::Parallel> borrowed{nullptr};

uint64_t generation(uint64_t word) { return word >> kGeneration; }
int highest(uint64_t word) { return static_cast<int>(word >> kLimit & 0x7FFF); }

}  // namespace

// Whether enough borrowed threads have come.
enum class Verdict { open, begin, leave };

struct Pool::State {
  std::mutex running;  // held by the caller whose job this is
  std::mutex mutex;    // of the sleepers
  std::condition_variable wake;
  std::atomic<uint64_t> word{0};
  std::atomic<int64_t> next{0};
  std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};
  std::atomic<int> arrived{0};
  std::atomic<Verdict> verdict{Verdict::open};
  int wanted = 0;
  int64_t parts = 0;
  Body body = nullptr;
  void* context = nullptr;
  std::vector<std::thread> workers;

  void take(int thread) {
    inside = true;
    for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
      body(context, part, thread);
    }
    inside = false;
  }

  bool news(uint64_t seen) const {
    const uint64_t now = word.load();
    return stop.load() || (now & kOpen && generation(now) != seen);
  }

  void await(uint64_t seen) {
    const auto end = Clock::now() + kSpin;
    while (Clock::now() < end) {
      for (int i = 0; i < 32; ++i) {
        if (news(seen)) return;
        relax();
      }
    }
    std::unique_lock<std::mutex> lock(mutex);
    ++sleepers;
    wake.wait(lock, [&] { return news(seen); });
    --sleepers;
  }

  void work(int thread) {
    for (uint64_t seen = 0; !stop.load();) {
      await(seen);
      uint64_t now = word.load();
      while (now & kOpen && generation(now) != seen && thread <= highest(now)) {
        if (!word.compare_exchange_weak(now, now + 1)) continue;
        take(thread);
        word.fetch_sub(1);
        break;
      }
      seen = generation(now);
    }
  }

  void open(int threads) {
    const uint64_t old = word.load();
    const uint64_t limit = static_cast<uint64_t>(threads - 1);
    word.store((generation(old) + 1) << kGeneration | limit << kLimit | kOpen);
    if (sleepers.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
  }

  // Make workers until there are threads - 1 of them; returns how many threads there are.
  int hire(int threads) {
    while (static_cast<int>(workers.size()) < threads - 1) {
      const int thread = static_cast<int>(workers.size()) + 1;
      try {
        workers.emplace_back([this, thread] { work(thread); });
      } catch (const std::system_error&) {  // the system gives no more threads
        return thread;
      }
    }
    return threads;
  }

  // Returns false where all threads were asked for and not all came.
  bool job(int threads, int64_t count, Body what, void* with, bool all) {
    parts = count;
    body = what;
    context = with;
    next.store(0);
    if (const Parallel parallel = borrowed.load()) {
      arrived.store(0);
      wanted = threads;
      verdict.store(all ? Verdict::open : Verdict::begin);
      parallel([](void* state) { static_cast<State*>(state)->arrive(); }, this,
               static_cast<unsigned>(threads), 0);
      return verdict.load() == Verdict::begin;
    }
    const int there = hire(threads);
    if (all && there < threads) return false;
    open(there);
    take(0);
    close();
    return true;
  }

  // Of a borrowed thread. A runtime may give fewer than it was asked for.
  void arrive() {
    const int thread = arrived.fetch_add(1);
    const auto end = Clock::now() + kPatience;
    while (verdict.load() == Verdict::open) {
      Verdict undecided = Verdict::open;
      if (arrived.load() >= wanted) verdict.compare_exchange_strong(undecided, Verdict::begin);
      else if (Clock::now() > end) verdict.compare_exchange_strong(undecided, Verdict::leave);
      relax();
    }
    if (verdict.load() == Verdict::begin && thread < wanted) take(thread);
  }

  void close() {
    word.fetch_and(~kOpen);
    for (int tries = 0; word.load() & kInside; ++tries) {
      // A worker that was put aside in the middle of a part needs this core.
      tries < 10000 ? relax() : std::this_thread::yield();
    }
  }
};

Pool::Pool() : state_(new State) {}

Pool::~Pool() {
  state_->stop.store(true);
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->wake.notify_all();
  }
  for (std::thread& worker : state_->workers) worker.join();
}

void Pool::run(int threads, int64_t parts, Body body, void* context) {
  State& s = *state_;
  if (threads > parts) threads = static_cast<int>(parts);
  std::unique_lock<std::mutex> mine(s.running, std::defer_lock);
  if (threads <= 1 || inside || !mine.try_lock()) {
    for (int64_t part = 0; part < parts; ++part) body(context, part, 0);
    return;
  }
  s.job(threads, parts, body, context, false);
}

bool Pool::together(int threads, Body body, void* context) {
  State& s = *state_;
  std::unique_lock<std::mutex> mine(s.running, std::defer_lock);
  if (inside || !mine.try_lock()) return false;
  // A thread that has a part waits in it for the others, so that each takes exactly one.
  return s.job(threads, threads, body, context, true);
}

void Pool::borrow(Parallel parallel) { borrowed.store(parallel); }

namespace {

// Never destroyed: threads of an interpreter that is shutting down may still be inside.
std::atomic<Pool*> process_pool{nullptr};

void forget() {
  process_pool.store(nullptr);
  borrowed.store(nullptr);
}

}  // namespace

Pool& Pool::shared() {
  static std::mutex making;
  Pool* pool = process_pool.load();
  if (pool == nullptr) {
    std::lock_guard<std::mutex> lock(making);
    pool = process_pool.load();
    if (pool == nullptr) {
#if defined(__unix__) || defined(__APPLE__)
      static const int registered = pthread_atfork(nullptr, nullptr, forget);
      (void)registered;
#endif
      pool = new Pool;
      process_pool.store(pool);
    }
  }
  return *pool;
}

}  // namespace rarefy
