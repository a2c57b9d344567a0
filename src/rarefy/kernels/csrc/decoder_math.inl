// Included once by each decoder_math_*.cpp, which is compiled for one instruction set.
//
// Plain loops that the compiler turns into vectors (-fopenmp-simd lets it reorder the sums).
// Everything lives in an unnamed namespace: the same inline function compiled with other flags
// must not be merged with this one.

#include <cmath>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "decoder_math.h"

namespace rarefy {
namespace {

constexpr int64_t kBlock = 64;  // channels of a head that are summed in registers

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// exp(x) to about 2e-7 relative: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. The minimax
// coefficients are those of Cephes' expf. Adding 1.5 * 2^23 rounds to the nearest integer.
inline float fast_exp(float x) {
  const float magic = 12582912.0f;
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_to_float((float_to_bits(shifted) + 127) << 23);
}

inline float half_to_float(uint16_t half) {
#ifdef __F16C__
  return _cvtsh_ss(half);
#else
  // The exponent is rescaled by a multiplication, which also handles subnormal numbers.
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value = bits_to_float(rest) * bits_to_float(0x77800000);  // 2^112
  if (value >= 65536.0f) value = bits_to_float(rest | 0x7f800000);
  return bits_to_float(float_to_bits(value) | sign);
#endif
}

inline uint16_t float_to_half(float value) {
#ifdef __F16C__
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float size = bits_to_float(bits & 0x7fffffff);
  if (!(size < 65520.0f)) {
    return static_cast<uint16_t>(sign | (size != size ? 0x7e00 : 0x7c00));
  }
  if (size < 6.103515625e-5f) {  // subnormal: a multiple of 2^-24
    return static_cast<uint16_t>(sign | (float_to_bits(size + 0.5f) - float_to_bits(0.5f)));
  }
  const uint32_t whole = float_to_bits(size) - (112u << 23);
  return static_cast<uint16_t>(sign | ((whole + 0xfff + ((whole >> 13) & 1)) >> 13));
#endif
}

void normalize(const float* x, const float* weight, float epsilon, float* out, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(n) + epsilon);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * factor);
}

void gate_up(float* gate, const float* up, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
}

void softmax(float* scores, int64_t n) {
  float top = scores[0];
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = scores[i] > top ? scores[i] : top;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float e = fast_exp(scores[i] - top);
    scores[i] = e;
    sum += e;
  }
  const float factor = 1.0f / sum;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) scores[i] *= factor;
}

void score(const float* query, const float* keys, float* scores, int64_t n, int64_t dim) {
  for (int64_t j = 0; j < n; ++j) {
    const float* key = keys + j * dim;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; ++i) sum += query[i] * key[i];
    scores[j] = sum;
  }
}

void mix(const float* weights, const float* values, float* out, int64_t n, int64_t dim) {
  int64_t at = 0;
  for (; at + kBlock <= dim; at += kBlock) {
    float sums[kBlock];
    std::memcpy(sums, out + at, sizeof sums);
    for (int64_t j = 0; j < n; ++j) {
      const float* value = values + j * dim + at;
      const float weight = weights[j];
#pragma omp simd
      for (int64_t i = 0; i < kBlock; ++i) sums[i] += weight * value[i];
    }
    std::memcpy(out + at, sums, sizeof sums);
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = at; i < dim; ++i) out[i] += weights[j] * values[j * dim + i];
  }
}

// Halves are widened a row at a time, into memory that stays in the first cache.
void widen(const uint16_t* halves, float* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m256i part = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + i));
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(part));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(part));
  }
#endif
  for (; i < n; ++i) out[i] = half_to_float(halves[i]);
}

void score_half(const float* query, const uint16_t* keys, float* scores, int64_t n, int64_t dim) {
  float key[kBlock];
  for (int64_t j = 0; j < n; ++j) {
    float sum = 0.0f;
    for (int64_t at = 0; at < dim; at += kBlock) {
      const int64_t count = dim - at < kBlock ? dim - at : kBlock;
      float part;
      widen(keys + j * dim + at, key, count);
      score(query + at, key, &part, 1, count);
      sum += part;
    }
    scores[j] = sum;
  }
}

void mix_half(const float* weights, const uint16_t* values, float* out, int64_t n, int64_t dim) {
  float value[kBlock];
  for (int64_t at = 0; at < dim; at += kBlock) {
    const int64_t count = dim - at < kBlock ? dim - at : kBlock;
    for (int64_t j = 0; j < n; ++j) {
      widen(values + j * dim + at, value, count);
      mix(weights + j, value, out + at, 1, count);
    }
  }
}

void to_half(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_half(x[i]);
}

constexpr DecoderMath kMath{normalize, gate_up, softmax, score, score_half, mix, mix_half, to_half};

}  // namespace
}  // namespace rarefy
