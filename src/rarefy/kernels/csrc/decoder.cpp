// One token through a decoder in one parallel region.
//
// A token of a small model takes a few milliseconds and some two hundred short products. Waking
// threads for each would cost as much as the products, so the region is entered once and its
// phases are separated by spinning barriers. Cheap things (norms, rotations) are computed by every
// thread for itself, which saves a barrier. Within a phase, threads take chunks of rows from a
// counter, so that one that the system interrupts does not hold up the others for long.

#include "decoder.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "barrier.h"
#include "decoder_math.h"
#include "pool.h"
#include "rowwise.h"

namespace rarefy {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kChunksPerThread = 4;
constexpr int64_t kRowAlign = 16;
constexpr int64_t kPairRows = 64;  // of gate and up whose results meet in the first cache
constexpr int kCounters = 12;      // of a block, at most: 7 first factors, 5 phases

struct alignas(64) Counter {
  std::atomic<int64_t> next{0};
};

// What one thread has for itself.
struct Local {
  Local(const rarefy_network& network, int number)
      : thread(number), head(network), normed(static_cast<size_t>(network.hidden)) {}

  int thread;
  size_t phase = 0;  // counters that this token has used
  RowWorker rows;
  HeadScratch head;
  std::vector<float> normed;
};

// Several linears with the same input, whose rows are numbered through.
struct Group {
  const rarefy_linear* linear[3];
  float* out[3];
  int count;
};

int64_t rank_of(const rarefy_linear& linear) { return linear.first.rows; }

class Decoder {
 public:
  explicit Decoder(const rarefy_network& network)
      : net_(network),
        blocks_(network.block, network.block + network.blocks),
        math_(decoder_math()),
        counters_(static_cast<size_t>(network.blocks) * kCounters + 2) {
    net_.block = blocks_.data();
    int64_t widest = 0, inner = 0, heads = 0, rank = rank_of(net_.head);
    for (const rarefy_block& block : blocks_) {
      widest = std::max(widest, block.query.rows + block.key.rows + block.value.rows);
      heads = std::max(heads, block.query.rows);
      inner = std::max(inner, block.up.rows);
      const rarefy_linear* all[] = {&block.query, &block.key, &block.value, &block.output,
                                    &block.gate, &block.up, &block.down};
      for (const rarefy_linear* linear : all) rank = std::max(rank, rank_of(*linear));
    }
    residual_.resize(static_cast<size_t>(net_.hidden));
    qkv_.resize(static_cast<size_t>(widest));
    mixed_.resize(static_cast<size_t>(heads));
    inner_.resize(static_cast<size_t>(inner));
    for (auto& part : narrow_) part.resize(static_cast<size_t>(rank));
  }

  int step(int64_t token, int64_t position, float* logits, int threads) {
    if (token < 0 || token >= net_.embedding.rows || position < 0 ||
        position >= net_.capacity || threads < 1) {
      return -1;
    }
    while (static_cast<int>(locals_.size()) < threads) {
      locals_.push_back(std::make_unique<Local>(net_, static_cast<int>(locals_.size())));
    }
    for (Counter& counter : counters_) counter.next.store(0, std::memory_order_relaxed);
    position_ = position;
    threads_ = threads;
    last_ = Clock::now();
    const auto body = [&](int thread) {
      work(*locals_[static_cast<size_t>(thread)], token, logits);
    };
    if (threads == 1 || !Pool::shared().team(threads, body)) {
      threads_ = 1;
      body(0);
    }
    return 0;
  }

  void profile(bool on, double* seconds) {
    timed_ = on;
    std::copy(seconds_, seconds_ + RAREFY_PHASES, seconds);
  }

 private:
  // Runs on every thread.
  void work(Local& local, int64_t token, float* logits) {
    local.phase = 0;
    if (local.thread == 0) local.rows.decode(net_.embedding, token, token + 1, residual_.data());
    meet(local, RAREFY_PHASE_EMBED);
    for (const rarefy_block& block : blocks_) {
      attention(block, local);
      mlp(block, local);
    }
    normalize(net_.final_norm, local);
    const Group group{{&net_.head, nullptr, nullptr}, {logits, nullptr, nullptr}, 1};
    product(group, local.normed.data(), local, RAREFY_PHASE_HEAD);
  }

  void attention(const rarefy_block& block, Local& local) {
    normalize(block.attention_norm, local);
    float* key = qkv_.data() + block.query.rows;
    const Group group{{&block.query, &block.key, &block.value},
                      {qkv_.data(), key, key + block.key.rows},
                      3};
    product(group, local.normed.data(), local, RAREFY_PHASE_QKV);
    const int64_t heads = block.query.rows / net_.head_dim;
    std::atomic<int64_t>& next = counters_[local.phase++].next;
    for (int64_t h; (h = next.fetch_add(1, std::memory_order_relaxed)) < heads;) {
      const HeadJob job{&net_, &block, qkv_.data(), mixed_.data(), h, position_};
      attend(job, local.head, math_);
    }
    meet(local, RAREFY_PHASE_ATTENTION);
    add(block.output, mixed_.data(), local, RAREFY_PHASE_OUTPUT);
  }

  void mlp(const rarefy_block& block, Local& local) {
    normalize(block.mlp_norm, local);
    const rarefy_linear *gate = &block.gate, *up = &block.up;
    const Group group{{gate, up, nullptr}, {nullptr, nullptr, nullptr}, 2};
    const float* x[3];
    inputs(group, local.normed.data(), x, local, RAREFY_PHASE_GATE_UP);
    rows(up->rows, local, [&](int64_t a, int64_t b) {
      for (; a < b; a += kPairRows) {
        const int64_t end = std::min(a + kPairRows, b);
        float other[kPairRows];
        apply(*gate, x[0], inner_.data() + a, a, end, local);
        apply(*up, x[1], other, a, end, local);
        math_.gate(inner_.data() + a, other, end - a);
      }
    });
    meet(local, RAREFY_PHASE_GATE_UP);
    add(block.down, inner_.data(), local, RAREFY_PHASE_DOWN);
  }

  void normalize(const float* weight, Local& local) const {
    math_.normalize(residual_.data(), weight, net_.epsilon, local.normed.data(), net_.hidden);
  }

  // The input of each linear's second factor; the common input where there is one factor only.
  void inputs(const Group& group, const float* x, const float** out, Local& local,
              rarefy_phase kind) {
    bool any = false;
    for (int i = 0; i < group.count; ++i) {
      const rarefy_linear& linear = *group.linear[i];
      const int64_t rank = rank_of(linear);
      out[i] = rank ? narrow_[i].data() : x;
      if (!rank) continue;
      any = true;
      rows(rank, local, [&](int64_t a, int64_t b) {
        local.rows.product(linear.first, x, narrow_[i].data() + a, a, b);
      });
    }
    if (any) meet(local, kind);
  }

  // Each linear of the group into its own output.
  void product(const Group& group, const float* x, Local& local, rarefy_phase kind) {
    const float* in[3];
    inputs(group, x, in, local, kind);
    int64_t total = 0;
    for (int i = 0; i < group.count; ++i) total += group.linear[i]->rows;
    rows(total, local, [&](int64_t a, int64_t b) {
      int64_t start = 0;
      for (int i = 0; i < group.count; ++i) {
        const rarefy_linear& linear = *group.linear[i];
        const int64_t low = std::max(a, start) - start;
        const int64_t high = std::min(b, start + linear.rows) - start;
        if (low < high) apply(linear, in[i], group.out[i] + low, low, high, local);
        start += linear.rows;
      }
    });
    meet(local, kind);
  }

  // Add a linear's result to the residual stream.
  void add(const rarefy_linear& linear, const float* x, Local& local, rarefy_phase kind) {
    const Group group{{&linear, nullptr, nullptr}, {nullptr, nullptr, nullptr}, 1};
    const float* in[3];
    inputs(group, x, in, local, kind);
    float part[kPairRows];
    rows(linear.rows, local, [&](int64_t a, int64_t b) {
      for (; a < b; a += kPairRows) {
        const int64_t end = std::min(a + kPairRows, b);
        apply(linear, in[0], part, a, end, local);
        for (int64_t row = a; row < end; ++row) residual_.data()[row] += part[row - a];
      }
    });
    meet(local, kind);
  }

  // Rows a .. b of a linear, written to out[0 ...].
  static void apply(const rarefy_linear& linear, const float* x, float* out, int64_t a, int64_t b,
                    Local& local) {
    const int64_t row0 = linear.row + a, row1 = linear.row + b;
    if (linear.rounded && linear.outlier > 0) {
      local.rows.product_mixed(linear.matrix, x, static_cast<float>(linear.outlier), out, row0, row1);
    } else if (linear.rounded) {
      local.rows.product_int8(linear.matrix, x, linear.input_scale, linear.input_group, out, row0,
                              row1);
    } else {
      local.rows.product(linear.matrix, x, out, row0, row1);
    }
    if (linear.bias == nullptr) return;
    for (int64_t row = a; row < b; ++row) out[row - a] += linear.bias[row];
  }

  // Call `work(a, b)` for chunks of rows until all are taken.
  template <typename Work>
  void rows(int64_t count, Local& local, const Work& work) {
    std::atomic<int64_t>& next = counters_[local.phase++].next;
    int64_t chunk = count;
    if (threads_ > 1) {
      const int64_t share = count / (threads_ * kChunksPerThread);
      chunk = std::max(kRowAlign, (share + kRowAlign - 1) / kRowAlign * kRowAlign);
    }
    for (;;) {
      const int64_t a = next.fetch_add(chunk, std::memory_order_relaxed);
      if (a >= count) return;
      work(a, std::min(a + chunk, count));
    }
  }

  // Wait until every thread has finished the phase.
  void meet(Local& local, rarefy_phase kind) {
    barrier_.wait(threads_);
    local.rows.renew();
    if (!timed_ || local.thread != 0) return;
    const Clock::time_point now = Clock::now();
    seconds_[kind] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

  rarefy_network net_;
  std::vector<rarefy_block> blocks_;
  const DecoderMath& math_;
  std::vector<Counter> counters_;
  std::vector<float> residual_, qkv_, mixed_, inner_, narrow_[3];
  std::vector<std::unique_ptr<Local>> locals_;
  Barrier barrier_;
  int64_t position_ = 0;
  int threads_ = 1;
  bool timed_ = false;
  double seconds_[RAREFY_PHASES] = {};
  Clock::time_point last_;
};

bool runs(const rarefy_linear& linear) {
  if (linear.outlier > 0 && linear.matrix.bits != 8) return false;
  if (linear.first.rows == 0) return has_rows(linear.matrix, linear.rounded != 0);
  return linear.rounded == 0 && has_rows(linear.matrix) && has_rows(linear.first);
}

}  // namespace
}  // namespace rarefy

using rarefy::Decoder;

extern "C" void* rarefy_decoder_new(const rarefy_network* network) {
  for (int64_t i = 0; i < network->blocks; ++i) {
    const rarefy_block& block = network->block[i];
    for (const rarefy_linear* linear : {&block.query, &block.key, &block.value, &block.output,
                                        &block.gate, &block.up, &block.down}) {
      if (!rarefy::runs(*linear)) return nullptr;
    }
  }
  if (!rarefy::runs(network->head) || !rarefy::has_rows(network->embedding)) return nullptr;
  try {
    return new Decoder(*network);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

extern "C" void rarefy_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

extern "C" int rarefy_decoder_step(void* decoder, int64_t token, int64_t position, float* logits,
                                   int threads) {
  return static_cast<Decoder*>(decoder)->step(token, position, logits, threads);
}

extern "C" void rarefy_decoder_profile(void* decoder, int on, double* seconds) {
  static_cast<Decoder*>(decoder)->profile(on != 0, seconds);
}
