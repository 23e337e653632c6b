#include "philox.h"

#include <algorithm>

#include "float_rules.h"

namespace tierstore {
namespace {

constexpr uint32_t kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
constexpr uint32_t kWeyl0 = 0x9e3779b9u, kWeyl1 = 0xbb67ae85u;
constexpr int kRounds = 10;
constexpr size_t kCounters = 8;  // at work at a time
constexpr size_t kWords = 4;     // of a counter
constexpr size_t kBlock = kCounters * kWords;

constexpr double kHalfPi = 1.57079632679489661923, kRootHalf = 0.70710678118654752440, kLn2 = 0.69314718055994530942;

// words: [kWords][kCounters], the counters on the way in.
TIERSTORE_BODY void philox(uint32_t (&words)[kWords][kCounters], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kRounds; ++round, key0 += kWeyl0, key1 += kWeyl1) {
    for (size_t i = 0; i < kCounters; ++i) {
      const uint64_t product0 = uint64_t{kMultiplier0} * words[0][i], product1 = uint64_t{kMultiplier1} * words[2][i];
      const auto high0 = static_cast<uint32_t>(product0 >> 32), high1 = static_cast<uint32_t>(product1 >> 32);
      words[0][i] = high1 ^ words[1][i] ^ key0;
      words[2][i] = high0 ^ words[3][i] ^ key1;
      words[1][i] = static_cast<uint32_t>(product1);
      words[3][i] = static_cast<uint32_t>(product0);
    }
  }
}

// ln of (word + 1) / 2^32: the exponent, and 2 artanh of what is left, between sqrt(1/2) and sqrt(2).
TIERSTORE_BODY double log_of(uint32_t word) {
  const double number = (static_cast<double>(word >> 1) * 2 + static_cast<double>(word & 1) + 1) * 0x1p-32;
  uint64_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  const uint64_t moved = bits + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
  const auto exponent = static_cast<int32_t>(moved >> 52) - 1023;
  const uint64_t rest_bits = bits - (static_cast<uint64_t>(static_cast<int64_t>(exponent)) << 52);
  double rest;
  std::memcpy(&rest, &rest_bits, sizeof rest);
  const double s = (rest - 1) / (rest + 1), z = s * s;
  double sum = 1.0 / 19;
  for (int odd = 17; odd > 0; odd -= 2) sum = sum * z + 1.0 / odd;
  return exponent * kLn2 + 2 * s * sum;
}

struct Pair {
  double cosine, sine;
};

// Of word / 2^32 of a turn: the quarter's middle is 0, so that the angle is at most pi / 4; then turned back.
TIERSTORE_BODY Pair turn_of(uint32_t word) {
  const uint32_t quarter = word >> 30;
  const double angle = (static_cast<double>(static_cast<int32_t>(word & 0x3fffffffu)) * 0x1p-30 - 0.5) * kHalfPi;
  const double z = angle * angle;
  double sine = 1.0 / 6227020800, cosine = -1.0 / 87178291200;
  sine = sine * z - 1.0 / 39916800;
  sine = sine * z + 1.0 / 362880;
  sine = sine * z - 1.0 / 5040;
  sine = sine * z + 1.0 / 120;
  sine = sine * z - 1.0 / 6;
  sine = (sine * z + 1) * angle;
  cosine = cosine * z + 1.0 / 479001600;
  cosine = cosine * z - 1.0 / 3628800;
  cosine = cosine * z + 1.0 / 40320;
  cosine = cosine * z - 1.0 / 720;
  cosine = cosine * z + 1.0 / 24;
  cosine = cosine * z - 1.0 / 2;
  cosine = cosine * z + 1;
  const double x = (cosine - sine) * kRootHalf, y = (cosine + sine) * kRootHalf;
  const double first = (quarter & 1) != 0 ? -y : x, second = (quarter & 1) != 0 ? x : y;
  return {(quarter & 2) != 0 ? -first : first, (quarter & 2) != 0 ? -second : second};
}

TIERSTORE_BODY void to_uniform(const Initializer& initializer, const uint32_t (&words)[kWords][kCounters], float* out) {
  const double width = initializer.high - initializer.low;
  for (size_t i = 0; i < kCounters; ++i) {
    for (size_t word = 0; word < kWords; ++word) {
      const double unit = static_cast<double>(static_cast<int32_t>(words[word][i] >> 8)) * 0x1p-24;
      out[i * kWords + word] = static_cast<float>(initializer.low + width * unit);
    }
  }
}

TIERSTORE_BODY void to_normal(const Initializer& initializer, const uint32_t (&words)[kWords][kCounters], float* out) {
  for (size_t half = 0; half < kWords; half += 2) {
    double radius[kCounters], cosine[kCounters], sine[kCounters];
    for (size_t i = 0; i < kCounters; ++i) radius[i] = __builtin_sqrt(-2 * log_of(words[half][i]));
    for (size_t i = 0; i < kCounters; ++i) {
      const Pair turn = turn_of(words[half + 1][i]);
      cosine[i] = turn.cosine;
      sine[i] = turn.sine;
    }
    for (size_t i = 0; i < kCounters; ++i) {
      out[i * kWords + half] = static_cast<float>(initializer.mean + initializer.deviation * (radius[i] * cosine[i]));
      out[i * kWords + half + 1] = static_cast<float>(initializer.mean + initializer.deviation * (radius[i] * sine[i]));
    }
  }
}

TIERSTORE_BODY void row_body(const Initializer& initializer, size_t dim, int64_t row_id, float* values) {
  for (size_t done = 0; done < dim; done += kBlock) {
    uint32_t words[kWords][kCounters];
    for (size_t i = 0; i < kCounters; ++i) {
      words[0][i] = static_cast<uint32_t>(done / kWords + i);
      words[1][i] = static_cast<uint32_t>(row_id);
      words[2][i] = static_cast<uint32_t>(static_cast<uint64_t>(row_id) >> 32);
      words[3][i] = initializer.table;
    }
    philox(words, static_cast<uint32_t>(initializer.seed), static_cast<uint32_t>(initializer.seed >> 32));
    float found[kBlock];
    if (initializer.kind == Initializer::Kind::kUniform) {
      to_uniform(initializer, words, found);
    } else {
      to_normal(initializer, words, found);
    }
    std::memcpy(values + done, found, std::min(kBlock, dim - done) * sizeof(float));
  }
}

void row_plain(const Initializer& initializer, size_t dim, int64_t row_id, float* values) {
  row_body(initializer, dim, row_id, values);
}
#if defined(__x86_64__)
TIERSTORE_AVX2 void row_avx2(const Initializer& initializer, size_t dim, int64_t row_id, float* values) {
  row_body(initializer, dim, row_id, values);
}
#else
constexpr auto row_avx2 = row_plain;
#endif

}  // namespace

void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t words[kWords][kCounters] = {};
  for (size_t word = 0; word < kWords; ++word) words[word][0] = counter[word];
  philox(words, key[0], key[1]);
  for (size_t word = 0; word < kWords; ++word) out[word] = words[word][0];
}

void initial_rows(const Initializer& initializer, size_t dim, size_t num_rows, const int64_t* row_ids,
                  float* const* values, bool plain) {
  const FloatRules rules;
  const auto row = plain || !has_avx2_fma() ? row_plain : row_avx2;
  for (size_t i = 0; i < num_rows; ++i) row(initializer, dim, row_ids[i], values[i]);
}

}  // namespace tierstore
