#include "attention.h"

#include <algorithm>
#include <cstring>

namespace rarefy {
namespace {

// The arithmetic on a cache of one type.
struct Floats {
  using Type = float;
  static constexpr auto score = &DecoderMath::score;
  static constexpr auto mix = &DecoderMath::mix;

  static const float* own(const float* x, uint16_t*, int64_t, const DecoderMath&) { return x; }
};

struct Halves {
  using Type = uint16_t;
  static constexpr auto score = &DecoderMath::score_half;
  static constexpr auto mix = &DecoderMath::mix_half;

  static const uint16_t* own(const float* x, uint16_t* room, int64_t n, const DecoderMath& math) {
    math.to_half(x, room, n);
    return room;
  }
};

// Normalize a head, if the model does, and rotate it to the token's position.
void place(const HeadJob& job, const float* x, const float* norm, float* out,
           const DecoderMath& math) {
  const rarefy_network& net = *job.network;
  if (norm != nullptr) {
    math.normalize(x, norm, net.epsilon, out, net.head_dim);
  } else {
    std::memcpy(out, x, static_cast<size_t>(net.head_dim) * sizeof(float));
  }
  const int64_t half = net.rotary / 2;
  const float* cosine = net.cosine + job.position * half;
  const float* sine = net.sine + job.position * half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = out[i], b = out[i + half];
    out[i] = a * cosine[i] - b * sine[i];
    out[i + half] = b * cosine[i] + a * sine[i];
  }
}

template <class Cache>
void attend_in(const HeadJob& job, HeadScratch& scratch, const DecoderMath& math) {
  using Type = typename Cache::Type;
  const rarefy_network& net = *job.network;
  const rarefy_block& block = *job.block;
  const int64_t dim = net.head_dim, shared = block.query.rows / block.key.rows;
  const int64_t source = job.head / shared;
  const float* key = job.qkv + block.query.rows + source * dim;
  float* query = scratch.query.data();
  place(job, job.qkv + job.head * dim, block.query_norm, query, math);
  place(job, key, block.key_norm, scratch.key.data(), math);
  for (int64_t i = 0; i < dim; ++i) query[i] *= net.scale;

  uint16_t* room = scratch.halves.data();
  const Type* own_key = Cache::own(scratch.key.data(), room, dim, math);
  const Type* own_value = Cache::own(key + block.key.rows, room + dim, dim, math);
  Type* keys = static_cast<Type*>(block.keys) + source * net.capacity * dim;
  Type* values = static_cast<Type*>(block.values) + source * net.capacity * dim;
  const int64_t seen = block.window > 0 ? block.window - 1 : job.position;
  const int64_t count = std::min(seen, job.position), first = job.position - count;

  float* scores = scratch.scores.data();
  float* out = job.out + job.head * dim;
  (math.*Cache::score)(query, keys + first * dim, scores, count, dim);
  (math.*Cache::score)(query, own_key, scores + count, 1, dim);
  math.softmax(scores, count + 1);
  std::fill(out, out + dim, 0.0f);
  (math.*Cache::mix)(scores, values + first * dim, out, count, dim);
  (math.*Cache::mix)(scores + count, own_value, out, 1, dim);
  if (job.head % shared == 0) {
    std::copy(own_key, own_key + dim, keys + job.position * dim);
    std::copy(own_value, own_value + dim, values + job.position * dim);
  }
}

}  // namespace

HeadScratch::HeadScratch(const rarefy_network& network)
    : query(static_cast<size_t>(network.head_dim)),
      key(static_cast<size_t>(network.head_dim)),
      scores(static_cast<size_t>(network.capacity)),
      halves(2 * static_cast<size_t>(network.head_dim)) {}

void attend(const HeadJob& job, HeadScratch& scratch, const DecoderMath& math) {
  if (job.network->half_cache) {
    attend_in<Halves>(job, scratch, math);
  } else {
    attend_in<Floats>(job, scratch, math);
  }
}

}  // namespace rarefy
