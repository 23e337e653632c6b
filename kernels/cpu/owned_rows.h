// The references of a batch, as they travel to the ranks that own the rows: distinct rows, by owner.
//
// Owner w has the rows from starts[w] up to starts[w + 1]. Distinct rows are in the order of owners, and of one owner
// in the order in which the batch first refers to them, so that neighbours stay together. Gradients are summed before
// they travel, for each group and row by themselves: the owner adds the groups of all ranks in one order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "distinct_rows.h"

namespace tierstore {

// Made whole by its constructor, then only read: any thread.
class OwnedRows {
 public:
  // row_ids: [num_references], kNoRow or below starts[num_owners]; groups: the same, ascending from 0 or more; null:
  // one group. starts: [num_owners + 1], ascending, the first 0. Throws std::invalid_argument, std::bad_alloc.
  OwnedRows(const int64_t* row_ids, const int32_t* groups, size_t num_references, const int64_t* starts,
            size_t num_owners);

  const DistinctRows& rows() const { return rows_; }
  // How many distinct rows each owner has, [num_owners].
  const std::vector<int64_t>& counts() const { return counts_; }

  // The sums: one for each group and row that meet, by owner, then by group, then as the batch has them.
  size_t num_groups() const { return num_groups_; }
  size_t num_sums() const { return num_groups_ == 1 ? rows_.count() : sums_.count(); }
  // How many sums each owner gets of each group, [num_owners, num_groups].
  const std::vector<int64_t>& sum_counts() const { return sum_counts_; }
  // Which of its owner's rows each sum is of, [num_sums]; empty with one group: sum i is of row i.
  const std::vector<uint32_t>& rows_of_sums() const { return rows_of_sums_; }

  // Copies distinct rows, row_bytes each, to every reference to them; zeros to references to no row.
  void expand(const uint8_t* values, size_t row_bytes, uint8_t* out, size_t num_threads) const;
  // Writes the sums of gradients [num_references, dim], times scale, into out [num_sums, dim].
  void sum(const float* gradients, size_t dim, float scale, float* out, size_t num_threads) const;

 private:
  void find_sums(const int32_t* groups, size_t num_references);

  DistinctRows rows_, sums_;  // of the second, a "row" is a pair of group and row
  std::vector<int64_t> counts_, sum_counts_;
  std::vector<uint32_t> rows_of_sums_;
  size_t num_groups_ = 1;
};

}  // namespace tierstore
