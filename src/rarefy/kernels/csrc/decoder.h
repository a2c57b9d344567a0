// One token through a Llama-shaped decoder in one call: the C interface.
//
// The caller owns every array and keeps it alive as long as the decoder. Weights are described by
// rarefy_matrix, whatever their kind; norms, biases and rotary tables are float32.
#pragma once

#include <cstdint>

#include "matrix.h"

extern "C" {

// y = W x + b, where W is rows `row .. row + rows` of a matrix (q, k and v may share one).
// A factorized W is `matrix` times `first`; otherwise `first.rows` is 0.
struct rarefy_linear {
  rarefy_matrix matrix;
  rarefy_matrix first;
  const float* bias;  // [rows], or null
  int64_t row, rows;
  const float* input_scale;  // of inputs that are rounded, or null: each vector's own
  int64_t rounded;           // inputs become int8 codes; not with `first`
  int64_t input_group;       // columns that share their scale: 64, or 0 for all
  double outlier;            // inputs at least as large do not, if it is positive; 8-bit weights only
};

// Pre-norm attention with grouped queries, then a gated MLP. Blocks may differ in width.
struct rarefy_block {
  rarefy_linear query, key, value, output, gate, up, down;
  const float *attention_norm, *mlp_norm;  // [hidden]
  const float *query_norm, *key_norm;      // [head_dim], or null
  void *keys, *values;                     // cache [kv_heads, capacity, head_dim]
  int64_t window;                          // positions that a token sees, 0 for all
};

struct rarefy_network {
  int64_t blocks, hidden, head_dim, rotary, capacity;
  float epsilon, scale;                    // of the norms; of the attention scores
  int32_t half_cache;                      // keys and values are float16 instead of float32
  const rarefy_block* block;
  rarefy_matrix embedding;                 // [vocabulary, hidden]
  rarefy_linear head;
  const float* final_norm;                 // [hidden]
  const float *cosine, *sine;              // [capacity, rotary / 2]
};

// Kinds of work that the profile tells apart.
enum rarefy_phase {
  RAREFY_PHASE_EMBED,
  RAREFY_PHASE_QKV,
  RAREFY_PHASE_ATTENTION,
  RAREFY_PHASE_OUTPUT,
  RAREFY_PHASE_GATE_UP,
  RAREFY_PHASE_DOWN,
  RAREFY_PHASE_HEAD,
  RAREFY_PHASES
};

// Copies the description, not the weights. Null when a linear has a kind that no kernel runs.
void* rarefy_decoder_new(const rarefy_network* network);
void rarefy_decoder_free(void* decoder);

// Feed one token at a position; keys and values of all earlier positions are in the cache.
// Writes logits [vocabulary] and returns 0, or -1 on a bad argument. One call at a time.
int rarefy_decoder_step(void* decoder, int64_t token, int64_t position, float* logits,
                        int threads);

// Seconds spent in each phase since the decoder was made, [RAREFY_PHASES]; switched on by `on`.
void rarefy_decoder_profile(void* decoder, int on, double* seconds);
}
