#include "gradient_norms.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace tierstore {
namespace {

constexpr size_t kParts = 16;

struct RowSquares {
  int64_t row;
  double squares;
};

double sum_of_squares(const float* values, size_t dim) {
  double parts[kParts] = {};
  size_t start = 0;
  for (; start + kParts <= dim; start += kParts)
    for (size_t part = 0; part < kParts; ++part) {
      const double value = values[start + part];
      parts[part] += value * value;
    }
  for (size_t part = 0; start + part < dim; ++part) {
    const double value = values[start + part];
    parts[part] += value * value;
  }
  for (size_t width = kParts / 2; width > 0; width /= 2)
    for (size_t part = 0; part < width; ++part) parts[part] += parts[part + width];
  return parts[0];
}

std::vector<RowSquares> squares_by_row(const int64_t* rows, const float* sums, size_t num_rows, size_t dim) {
  std::vector<RowSquares> squares(num_rows);
  for (size_t i = 0; i < num_rows; ++i) squares[i] = {rows[i], sum_of_squares(sums + i * dim, dim)};
  std::sort(squares.begin(), squares.end(), [](const RowSquares& a, const RowSquares& b) { return a.row < b.row; });
  return squares;
}

}  // namespace

void gradient_squares(const int64_t* rows, const float* sums, size_t num_rows, size_t dim, double* out) {
  const std::vector<RowSquares> squares = squares_by_row(rows, sums, num_rows, dim);
  for (size_t i = 0; i < num_rows; ++i) out[i] = squares[i].squares;
}

void gradient_norms(const int64_t* rows, const float* sums, size_t num_rows, size_t dim, const int64_t* block_starts,
                    size_t num_blocks, double* out) {
  const std::vector<RowSquares> squares = squares_by_row(rows, sums, num_rows, dim);
  size_t at = 0;
  for (size_t block = 0; block < num_blocks; ++block) {
    double sum = 0;
    const bool is_last = block + 1 == num_blocks;
    for (; at < num_rows && (is_last || squares[at].row < block_starts[block + 1]); ++at) sum += squares[at].squares;
    out[block] = std::sqrt(sum);
  }
}

}  // namespace tierstore
