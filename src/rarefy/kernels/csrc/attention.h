// Attention of one token, head by head.
#pragma once

#include <cstdint>
#include <vector>

#include "decoder.h"
#include "decoder_math.h"

namespace rarefy {

struct HeadJob {
  const rarefy_network* network;
  const rarefy_block* block;
  const float* qkv;  // the token's queries, keys and values, one after the other
  float* out;        // [heads, head_dim]
  int64_t head, position;
};

// What one thread needs beside its job.
struct HeadScratch {
  explicit HeadScratch(const rarefy_network& network);

  std::vector<float> query, key, scores;
  std::vector<uint16_t> halves;
};

// Attention of one query head over the cache and the token's own key and value. The first head
// of a group appends these to the cache; its neighbours read only earlier positions.
void attend(const HeadJob& job, HeadScratch& scratch, const DecoderMath& math);

}  // namespace rarefy
