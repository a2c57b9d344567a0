// Every kernel of grouped integers and dense matrices over ragged shapes, for the sanitizers: each
// buffer is exactly as long as it has to be, so that a read or write beyond its end is found, and
// products are compared with decoded rows; then whole decoders of every kind of matrix, whose threads
// must agree on every bit. See `make sanitize`.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../src/rarefy/kernels/csrc/decoder.h"
#include "../src/rarefy/kernels/csrc/matrix.h"

namespace {

std::mt19937 dice(0);

int failures = 0;

// Exactly `count` elements of their own on the heap.
template <class T>
std::unique_ptr<T[]> exactly(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count)]());
}

std::unique_ptr<uint32_t[]> random_words(int64_t count) {
  auto words = exactly<uint32_t>(count);
  for (int64_t i = 0; i < count; ++i) words[i] = static_cast<uint32_t>(dice());
  return words;
}

std::unique_ptr<float[]> random_floats(int64_t count) {
  auto values = exactly<float>(count);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) values[i] = normal(dice);
  return values;
}

// The difference between a product and the rows that decoding gives, relative to the norms of weights
// and inputs: the sums of a row or two may cancel.
double difference(const rarefy_matrix& m, const float* weights, const float* x, const float* y,
                  int64_t vectors) {
  double error = 0, size = 1e-30;
  for (int64_t t = 0; t < vectors; ++t) {
    for (int64_t r = 0; r < m.rows; ++r) {
      double sum = 0, w2 = 0, x2 = 0;
      for (int64_t j = 0; j < m.columns; ++j) {
        const double w = weights[r * m.columns + j], v = x[t * m.columns + j];
        sum += w * v, w2 += w * w, x2 += v * v;
      }
      error += (sum - y[t * m.rows + r]) * (sum - y[t * m.rows + r]);
      size += w2 * x2;
    }
  }
  return std::sqrt(error / size);
}

void expect(bool met, const char* what, const rarefy_matrix& m, int64_t vectors, double value) {
  if (met) return;
  ++failures;
  std::printf("%s: kind %d, %d bits, %lld x %lld, group %lld, %lld vectors: %g\n", what, m.kind,
              m.bits, static_cast<long long>(m.rows), static_cast<long long>(m.columns),
              static_cast<long long>(m.group), static_cast<long long>(vectors), value);
}

void check(const rarefy_matrix& m, int64_t vectors, int threads) {
  auto x = random_floats(vectors * m.columns), y = exactly<float>(vectors * m.rows);
  auto weights = exactly<float>(m.rows * m.columns);
  int status = rarefy_decode(&m, 0, m.rows, weights.get(), threads);
  status |= rarefy_matvec(&m, x.get(), y.get(), vectors, threads);
  const double found = difference(m, weights.get(), x.get(), y.get(), vectors);
  expect(status == 0 && found < 1e-5, "product", m, vectors, status ? status : found);
  status = rarefy_matmul(&m, x.get(), y.get(), vectors, threads);
  const double many = difference(m, weights.get(), x.get(), y.get(), vectors);
  const bool refused = status == RAREFY_UNSUPPORTED && rarefy_instructions()[0] == 'p';
  expect(refused || (status == 0 && many < 1e-5), "product of many", m, vectors,
         status ? status : many);
  if (m.kind != RAREFY_INT) return;
  for (const int64_t input_group : {0, 64}) {
    status = rarefy_matvec_int8(&m, x.get(), nullptr, input_group, y.get(), vectors, threads);
    const double rounded = difference(m, weights.get(), x.get(), y.get(), vectors);
    expect(status == 0 && rounded < 0.02, "int8 product", m, vectors, status ? status : rounded);
  }
  const int64_t last = m.rows - 1;
  auto row = exactly<float>(m.columns);
  status = rarefy_decode_rows(&m, &last, 1, row.get(), threads);
  bool same = status == 0;
  for (int64_t j = 0; j < m.columns; ++j) same &= row[j] == weights[last * m.columns + j];
  expect(same, "last row", m, 1, status);
}

// Scales of 16 bits, zero points of as many bits as codes have; or, `finer`, of 8 bits both.
void check_integers(int bits, int64_t rows, int64_t columns, int64_t group, int variant,
                    bool finer = false) {
  const int64_t words = (columns * bits + 31) / 32;
  const int64_t groups = group > 0 && group < columns ? (columns + group - 1) / group : 1;
  const int64_t zero_words = (rows * (finer ? 8 : bits) + 31) / 32 * groups;
  auto codes = random_words(rows * words), zeros = random_words(zero_words);
  auto scales = exactly<uint16_t>(rows * groups);
  const bool half = variant & 1;
  for (int64_t i = 0; i < rows * groups; ++i) {  // between 2^-8 and 2^-6 in either type
    scales[i] = static_cast<uint16_t>(half ? 0x1C00 + dice() % 0x800 : 0x3B80 + dice() % 0x100);
  }
  const bool symmetric = variant & 2;
  const rarefy_matrix m{RAREFY_INT, bits, half ? RAREFY_SCALE_F16 : RAREFY_SCALE_BF16, symmetric,
                        rows, columns, group, words, codes.get(), scales.get(),
                        symmetric ? nullptr : zeros.get(), nullptr, nullptr, 0};
  if (!finer) return check(m, 1 + variant * 3, 1 + variant % 3);
  auto octets = exactly<uint8_t>(rows * groups);
  auto units = exactly<float>(rows);
  for (int64_t i = 0; i < rows * groups; ++i) octets[i] = static_cast<uint8_t>(64 + dice() % 192);
  for (int64_t i = 0; i < rows; ++i) units[i] = 1e-4f * static_cast<float>(1 + dice() % 4);
  rarefy_matrix other = m;
  other.scale_type = RAREFY_SCALE_U8;
  other.scales = octets.get();
  other.units = units.get();
  other.zero_bits = 8;
  check(other, 1 + variant * 3, 1 + variant % 3);
}

void check_dense(int kind, int64_t rows, int64_t columns, int64_t vectors) {
  auto values = random_floats(rows * columns);
  auto halves = exactly<uint16_t>(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) halves[i] = static_cast<uint16_t>(0x3800 + dice() % 0x400);
  const void* codes = kind == RAREFY_F32 ? static_cast<void*>(values.get()) : halves.get();
  check(rarefy_matrix{kind, 0, 0, 0, rows, columns, 0, 0, codes, nullptr, nullptr, nullptr, nullptr, 0},
        vectors, 2);
}

// A small decoder with arrays of its own.
struct Model {
  static constexpr int64_t kBlocks = 2, kHidden = 40, kHead = 8, kHeads = 6, kGroups = 2, kInner = 70,
                           kWords = 51, kRoom = 9;
  std::vector<std::unique_ptr<float[]>> floats;
  std::vector<std::unique_ptr<uint16_t[]>> halves;
  std::vector<std::unique_ptr<uint32_t[]>> words;
  std::vector<rarefy_block> blocks;
  rarefy_network network{};

  float* keep(std::unique_ptr<float[]> values) {
    floats.push_back(std::move(values));
    return floats.back().get();
  }

  rarefy_matrix dense(int64_t rows, int64_t columns) {
    float* values = keep(random_floats(rows * columns));
    for (int64_t i = 0; i < rows * columns; ++i) values[i] *= 0.2f;
    return {RAREFY_F32, 0, 0, 0, rows, columns, 0, 0, values, nullptr, nullptr, nullptr,
            nullptr, 0};
  }

  rarefy_matrix integers(int bits, int64_t rows, int64_t columns, int64_t group) {
    const int64_t groups = group ? (columns + group - 1) / group : 1;
    const int64_t per_row = (columns * bits + 31) / 32;
    words.push_back(random_words(rows * per_row));
    halves.push_back(exactly<uint16_t>(rows * groups));
    for (int64_t i = 0; i < rows * groups; ++i) {
      halves.back()[i] = static_cast<uint16_t>((bits > 4 ? 0x1000 : 0x2400) + dice() % 0x400);
    }
    return {RAREFY_INT, bits, RAREFY_SCALE_F16, 1, rows, columns, group, per_row,
            words.back().get(), halves.back().get(), nullptr, nullptr, nullptr, 0};
  }

  // Which kind a matrix has follows from its number.
  rarefy_linear linear(int64_t rows, int64_t columns, int number) {
    rarefy_linear made{};
    made.rows = rows;
    made.bias = number % 2 ? keep(random_floats(rows)) : nullptr;
    switch (number % 5) {
      case 0:
        made.matrix = dense(rows, columns);
        break;
      case 1:
        made.matrix = integers(4, rows, columns, 8);
        break;
      case 2:  // rounded inputs, each vector or its columns with scales of their own
        made.input_group = dice() % 2 * 64;
        made.matrix = integers(8, rows, columns, 0);
        made.rounded = 1;
        made.outlier = number % 3 ? 0.0 : 1.0;
        break;
      case 3:  // rounded inputs with a stored scale
        made.matrix = integers(4, rows, columns, 8);
        made.rounded = 1;
        made.input_scale = keep(exactly<float>(1));
        const_cast<float*>(made.input_scale)[0] = 0.03f;
        break;
      default:  // two factors
        made.matrix = integers(3, rows, 11, 0);
        made.first = dense(11, columns);
    }
    return made;
  }

  explicit Model(int number) {
    for (int64_t b = 0; b < kBlocks; ++b) {
      rarefy_block block{};
      block.query = linear(kHeads * kHead, kHidden, number);
      block.key = linear(kGroups * kHead, kHidden, number + 1);
      block.value = linear(kGroups * kHead, kHidden, number + 2);
      block.output = linear(kHidden, kHeads * kHead, number + 3);
      block.gate = linear(kInner, kHidden, number + 4);
      block.up = linear(kInner, kHidden, number + 1);
      block.down = linear(kHidden, kInner, number + 2);
      block.attention_norm = keep(random_floats(kHidden));
      block.mlp_norm = keep(random_floats(kHidden));
      block.query_norm = b ? keep(random_floats(kHead)) : nullptr;
      block.key_norm = b ? keep(random_floats(kHead)) : nullptr;
      block.keys = keep(exactly<float>(kGroups * kRoom * kHead));
      block.values = keep(exactly<float>(kGroups * kRoom * kHead));
      block.window = b ? 3 : 0;
      blocks.push_back(block);
    }
    network = {kBlocks, kHidden, kHead, kHead, kRoom, 1e-5f, 0.35f, 0, blocks.data(),
               dense(kWords, kHidden), linear(kWords, kHidden, number), keep(random_floats(kHidden)),
               keep(random_floats(kRoom * kHead / 2)), keep(random_floats(kRoom * kHead / 2))};
  }
};

void check_decoder(int number) {
  const Model model(number);
  void* decoder = rarefy_decoder_new(&model.network);
  expect(decoder != nullptr, "decoder", model.network.head.matrix, number, 0);
  if (decoder == nullptr) return;
  auto alone = exactly<float>(Model::kWords * Model::kRoom), logits = exactly<float>(Model::kWords);
  for (int threads = 1; threads <= 4; ++threads) {
    bool same = true;
    for (int64_t at = 0; at < Model::kRoom; ++at) {
      const int64_t token = (7 * at + number) % Model::kWords;
      float* out = threads == 1 ? alone.get() + at * Model::kWords : logits.get();
      same &= rarefy_decoder_step(decoder, token, at, out, threads) == 0;
      for (int64_t i = 0; i < Model::kWords; ++i) {
        same &= std::isfinite(out[i]) && out[i] == alone[at * Model::kWords + i];
      }
    }
    expect(same, "decoder's threads", model.network.head.matrix, number, threads);
  }
  double seconds[RAREFY_PHASES];
  rarefy_decoder_profile(decoder, 1, seconds);
  const bool refused = rarefy_decoder_step(decoder, Model::kWords, 0, logits.get(), 2) != 0 &&
                       rarefy_decoder_step(decoder, 0, Model::kRoom, logits.get(), 2) != 0;
  expect(refused, "decoder's range", model.network.head.matrix, number, 0);
  rarefy_decoder_free(decoder);
}

}  // namespace

int main() {
  std::printf("%s\n", rarefy_instructions());
  for (int bits = 2; bits <= 8; ++bits) {
    for (int64_t columns : {1, 7, 16, 31, 33, 63, 64, 100, 129, 250}) {
      for (int64_t group : {0, 1, 8, 16, 24, 32, 48, 64, 100}) {
        if (group > columns) continue;
        for (int variant = 0; variant < 4; ++variant) {
          check_integers(bits, 1 + dice() % 13, columns, group, variant, dice() % 3 == 0);
        }
      }
    }
  }
  // Groups of whole steps and half steps, and more of them than one register has.
  for (int bits : {2, 3, 4, 8}) {
    for (int64_t columns : {128, 576, 1024}) {
      for (int64_t group : {0, 32, 64, 96, 128, 192, 512}) {
        for (int variant = 0; variant < 8; ++variant) {
          check_integers(bits, 1 + dice() % 13, columns, group, variant % 4, variant > 3);
        }
      }
    }
  }
  for (int kind : {RAREFY_F32, RAREFY_F16, RAREFY_BF16}) {
    for (int64_t columns : {1, 7, 8, 15, 16, 17, 100}) {
      for (int64_t vectors : {1, 3, 4, 6}) check_dense(kind, 1 + dice() % 13, columns, vectors);
    }
  }
  for (int64_t columns : {255, 256, 600}) {  // more than one block of columns and of vectors
    for (int64_t vectors : {31, 70, 530}) check_dense(RAREFY_F32, 61, columns, vectors);
  }
  // Callers at the same time, each with threads of its own wish.
  std::thread beside([] {
    std::mt19937 own(1);
    auto x = exactly<float>(512), y = exactly<float>(64), w = exactly<float>(512 * 64);
    for (int64_t i = 0; i < 512 * 64; ++i) w[i] = static_cast<float>(own() % 7);
    const rarefy_matrix m{RAREFY_F32, 0, 0, 0, 64, 512, 0, 0, w.get(), nullptr, nullptr, nullptr,
                          nullptr, 0};
    for (int i = 0; i < 300; ++i) rarefy_matvec(&m, x.get(), y.get(), 1, 1 + i % 3);
  });
  for (int i = 0; i < 60; ++i) check_dense(RAREFY_F32, 61, 513, 1);
  beside.join();
  for (int number = 0; number < 10; ++number) check_decoder(number);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
