#include "gradient_norms.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace tierstore {
namespace {

constexpr size_t kLanes = 16;

struct RowSquares {
  int64_t row;
  double squares;
};

double sum_of_squares(const float* values, size_t dim) {
  double lanes[kLanes] = {};
  size_t start = 0;
  for (; start + kLanes <= dim; start += kLanes)
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const double value = values[start + lane];
      lanes[lane] += value * value;
    }
  for (size_t lane = 0; start + lane < dim; ++lane) {
    const double value = values[start + lane];
    lanes[lane] += value * value;
  }
  for (size_t width = kLanes / 2; width > 0; width /= 2)
    for (size_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

}  // namespace

void gradient_norms(const int64_t* rows, const float* sums, size_t num_rows, size_t dim, const int64_t* block_starts,
                    size_t num_blocks, double* out) {
  std::vector<RowSquares> squares(num_rows);
  for (size_t i = 0; i < num_rows; ++i) squares[i] = {rows[i], sum_of_squares(sums + i * dim, dim)};
  std::sort(squares.begin(), squares.end(), [](const RowSquares& a, const RowSquares& b) { return a.row < b.row; });
  size_t at = 0;
  for (size_t block = 0; block < num_blocks; ++block) {
    double sum = 0;
    const bool is_last = block + 1 == num_blocks;
    for (; at < num_rows && (is_last || squares[at].row < block_starts[block + 1]); ++at) sum += squares[at].squares;
    out[block] = std::sqrt(sum);
  }
}

}  // namespace tierstore
