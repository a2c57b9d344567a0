// The arithmetic of a token that is not a matrix product, once for each instruction set.
#pragma once

#include <cstdint>

namespace rarefy {

struct DecoderMath {
  // out = x / sqrt(mean(x^2) + epsilon) * weight
  void (*normalize)(const float* x, const float* weight, float epsilon, float* out, int64_t n);
  // gate = gate / (1 + exp(-gate)) * up
  void (*gate)(float* gate, const float* up, int64_t n);
  // scores = exp(scores - max) / sum
  void (*softmax)(float* scores, int64_t n);
  // scores[j] = query . keys[j]
  void (*score)(const float* query, const float* keys, float* scores, int64_t n, int64_t dim);
  void (*score_half)(const float* query, const uint16_t* keys, float* scores, int64_t n,
                     int64_t dim);
  // out += sum_j weights[j] values[j]
  void (*mix)(const float* weights, const float* values, float* out, int64_t n, int64_t dim);
  void (*mix_half)(const float* weights, const uint16_t* values, float* out, int64_t n,
                   int64_t dim);
  // float32 to float16, to nearest even
  void (*to_half)(const float* x, uint16_t* out, int64_t n);
};

const DecoderMath* decoder_math_portable();
const DecoderMath* decoder_math_avx2();
const DecoderMath* decoder_math_avx512();

// The best that this machine and RAREFY_KERNELS allow.
const DecoderMath& decoder_math();

}  // namespace rarefy
