// The one description of a stored matrix that every kernel takes, and the C interface of the library.
//
// Symbols: m rows, n columns, b bits, g columns a group, G = ceil(n / g) groups a row.
// Pointers borrow the checkpoint's tensors; nothing is copied, and nothing needs to be aligned
// beyond its own element.
#pragma once

#include <cstdint>

extern "C" {

enum rarefy_kind {
  RAREFY_F32 = 0,
  RAREFY_F16 = 1,
  RAREFY_BF16 = 2,
  RAREFY_INT = 3,
  RAREFY_BCQ = 4,
  RAREFY_BITMASK = 5,
  RAREFY_TWO_FOUR = 6,
};

enum rarefy_scale_type {
  RAREFY_SCALE_F32 = 0,
  RAREFY_SCALE_F16 = 1,
  RAREFY_SCALE_BF16 = 2,
  RAREFY_SCALE_U8 = 3,  // times the row's unit
};

enum rarefy_status {
  RAREFY_DONE = 0,
  RAREFY_UNSUPPORTED = 1,  // the caller takes the reference
  RAREFY_BAD_ARGUMENT = 2,
  RAREFY_NO_MEMORY = 3,
};

// Grouped integers (RAREFY_INT): w = scale * (code - zero).
//   codes   [m, words_per_row] 32-bit words, an LSB-first bit stream along each row
//   scales  [m, G] in scale_type
//   units   [m] float32, which multiply scales of RAREFY_SCALE_U8; else unused
//   zeros   [ceil(m c / 32), G] 32-bit words, packed along rows, c = zero_bits of each, b .. 8: the
//           zero point is the packed number / 2^(c-b); null when symmetric, where it is 2^(b-1)
// Dense (RAREFY_F32, _F16, _BF16): codes [m, n] in that type; bits, scales, zeros unused.
// The other kinds are described where they are multiplied (lut.h, sparse.h).
struct rarefy_matrix {
  int32_t kind;
  int32_t bits;
  int32_t scale_type;
  int32_t symmetric;
  int64_t rows;
  int64_t columns;
  int64_t group;  // columns a group; 0 or n: one group a row
  int64_t words_per_row;
  const void* codes;
  const void* scales;
  const void* zeros;
  const void* extra;
  const float* units;
  int32_t zero_bits;  // 0: as many as codes have
};

// y[t, m] = x[t, n] W^T for t < vectors, float32, row-major. Returns a rarefy_status.
int rarefy_matvec(const rarefy_matrix* matrix, const float* x, float* y, int64_t vectors,
                  int threads);

// The same for many vectors: rows are decoded once for all of them.
int rarefy_matmul(const rarefy_matrix* matrix, const float* x, float* y, int64_t vectors,
                  int threads);

// The same with every vector rounded to int8 codes first, integer accumulators (RAREFY_INT only):
//   y = s_x s_g sum (code - zero) round(x / s_x),  s_x = max|x| / 127 of each vector,
// or the given scale where `input_scale` is not null (one number for all vectors). With an
// `input_group` of 64 every 64 columns of a vector have their own s_x; else it is 0.
int rarefy_matvec_int8(const rarefy_matrix* matrix, const float* x, const float* input_scale,
                       int64_t input_group, float* y, int64_t vectors, int threads);

// out[row1 - row0, n] = those rows as float32.
int rarefy_decode(const rarefy_matrix* matrix, int64_t row0, int64_t row1, float* out,
                  int threads);

// out[count, n] = the rows of those numbers as float32 (RAREFY_INT only).
int rarefy_decode_rows(const rarefy_matrix* matrix, const int64_t* rows, int64_t count, float* out,
                       int threads);

// "avx512-vnni", "avx2" or "portable": what the processor and RAREFY_KERNELS allow.
const char* rarefy_instructions(void);

// Allow no better instructions than "portable", "avx2" or "avx512" from here on, as RAREFY_KERNELS
// does from the start; returns what is then used. For tests and benchmarks.
const char* rarefy_limit(const char* name);

// Take the threads of an OpenMP runtime of this process from here on, given its GOMP_parallel, so
// that two sets of threads do not contend for the cores; null: the library's own threads.
void rarefy_borrow(void (*parallel)(void (*)(void*), void*, unsigned, unsigned));

// Read `bytes` once with the pool's threads and widest loads; returns a checksum. For benchmarks.
uint64_t rarefy_read(const void* data, int64_t bytes, int threads);
}

namespace rarefy {

class Pool;

int matvec(const rarefy_matrix& matrix, const float* x, float* y, int64_t vectors, Pool& pool,
           int threads);
int matvec_int8(const rarefy_matrix& matrix, const float* x, const float* input_scale,
                int64_t input_group, float* y, int64_t vectors, Pool& pool, int threads);
int decode(const rarefy_matrix& matrix, int64_t row0, int64_t row1, float* out, Pool& pool,
           int threads);
int decode_rows(const rarefy_matrix& matrix, const int64_t* rows, int64_t count, float* out,
                Pool& pool, int threads);

}  // namespace rarefy
