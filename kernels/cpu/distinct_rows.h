// The distinct rows among the references of a batch, and where the gradients of each lie, in the order of summing.
//
// A hash table of places, at most half full, then one counting sort: about 10 ns a reference, and the same answer
// whatever the table's order is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tierstore {

constexpr size_t kReferencesMax = size_t{1} << 31;  // of one call
constexpr int64_t kNoRow = -1;                      // a reference to no row: it has no gradient and zero values

struct BadReference {
  size_t place;   // of the first reference that is wrong; SIZE_MAX: all are right
  bool is_group;  // its group is negative, and not its row id outside the table
};

// Memory is kept from batch to batch. One thread at a time.
class DistinctRows {
 public:
  // What `find` needs at most for so many references, in bytes, all vectors included.
  static size_t bytes_for(size_t num_references);

  // row_ids: [num_references], kNoRow or at least 0 and below num_rows. groups: [num_references], at least 0, in any
  // order; null: one group. Throws std::bad_alloc; after that, or a bad reference, there are no rows.
  BadReference find(const int64_t* row_ids, const int32_t* groups, size_t num_references, int64_t num_rows);

  // Gives memory beyond `num_references` back.
  void shrink(size_t num_references);

  size_t count() const { return row_ids_.size(); }
  // In the order in which the batch first refers to them.
  const int64_t* row_ids() const { return row_ids_.data(); }
  // The references of row i: places()[starts()[i]] up to places()[starts()[i + 1]], by group, and in a group as the
  // batch has them.
  const uint32_t* starts() const { return starts_.data(); }
  const uint32_t* places() const { return places_.data(); }
  // [num_references], of the batch; kNotDistinct for kNoRow.
  const uint32_t* distinct_of() const { return distinct_of_.data(); }
  // Of the last batch; null if it had one group, or each row only references of one.
  const int32_t* groups() const { return groups_; }
  static constexpr uint32_t kNotDistinct = UINT32_MAX;

 private:
  void clear();
  void hash_rows(const int64_t* row_ids, size_t num_references);
  void sort_places(const int32_t* groups, size_t num_references);

  std::vector<int64_t> row_ids_;
  std::vector<uint32_t> starts_, places_, distinct_of_;
  std::vector<uint32_t> table_;      // of numbers of distinct rows, kNotDistinct if free
  std::vector<uint32_t> by_group_;   // places, if groups are not in ascending order
  const int32_t* groups_ = nullptr;  // the caller's
};

}  // namespace tierstore
