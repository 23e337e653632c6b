// Initial values of rows that no checkpoint has: a function of seed, table, row id and column, whoever asks when.
//
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011). Key: the seed.
// Counter: column / 4, row id low, row id high, table; its four words are for four columns. Uniform: the upper 24 bits
// of a word. Normal: Box-Muller of the two words of a pair, in float64 with +, -, *, / and sqrt only, so that no libm
// counts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tierstore {

struct Initializer {
  enum class Kind : uint8_t { kUniform, kNormal };
  Kind kind = Kind::kNormal;
  double low = 0, high = 0;        // kUniform: at least low, below high unless rounding to float32 reaches it
  double mean = 0, deviation = 0;  // kNormal
  uint64_t seed = 0;
  uint32_t table = 0;  // a number that keeps the tables of one seed apart
};

void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

// Writes the `dim` initial values of each row: values [num_rows], where each row's begin.
void initial_rows(const Initializer& initializer, size_t dim, size_t num_rows, const int64_t* row_ids,
                  float* const* values, bool plain = false);

}  // namespace tierstore
