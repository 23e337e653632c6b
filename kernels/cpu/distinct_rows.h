// The distinct rows among the references of a batch, and where the gradients of each lie, in the order of summing.
//
// A hash table of places, at most half full, then one counting sort: about 10 ns a reference, and the same answer
// whatever the order of the table is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tierstore {

constexpr size_t kReferencesMax = size_t{1} << 30;  // of one batch
constexpr int64_t kNoRow = -1;                      // a reference to no row: its gradient is dropped

struct BadReference {
  size_t place;   // of the first reference that is wrong; kAllGood if all are right
  bool is_group;  // its group is negative; else its row id is outside the table
};

constexpr size_t kAllGood = SIZE_MAX;

// Ranges of row ids: owner w has those from starts[w] up to starts[w + 1]. starts: [count + 1], ascending.
struct Owners {
  const int64_t* starts = nullptr;
  size_t count = 0;
};

// Memory is kept from batch to batch. One thread at a time; what it found is read by any.
class DistinctRows {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;
  static constexpr uint32_t kNewGroup = uint32_t{1} << 31;  // in `places`: a row's group before this place was another

  // What `find` needs at most for so many references, in bytes, all vectors together.
  static size_t bytes_for(size_t num_references);

  // row_ids: [num_references], kNoRow or at least 0 and below num_rows. groups: [num_references], at least 0, in any
  // order; null: one group. owners: of which all row ids are; rows are put in their order. Throws std::bad_alloc; after
  // that, or a bad reference, there are no rows.
  BadReference find(const int64_t* row_ids, const int32_t* groups, size_t num_references, int64_t num_rows,
                    Owners owners = {});

  // Gives all memory back.
  void release();

  size_t count() const { return row_ids_.size(); }
  size_t num_references() const { return row_of_.size(); }
  // In the order in which the batch first refers to them; of owners, first by owner.
  const int64_t* row_ids() const { return row_ids_.data(); }
  // The references of row i are places()[starts()[i]] up to places()[starts()[i + 1]]: by group, and in a group as the
  // batch has them. Where the group changes, kNewGroup is added.
  const uint32_t* starts() const { return starts_.data(); }
  const uint32_t* places() const { return places_.data(); }
  // How many rows before row i have several references; [count() + 1].
  const uint32_t* repeated_before() const { return repeated_before_.data(); }
  // The row of each reference, by its number here; kNone for kNoRow. [num_references]
  const uint32_t* row_of() const { return row_of_.data(); }

 private:
  void clear();
  BadReference hash_rows(const int64_t* row_ids, const int32_t* groups, size_t num_references, int64_t num_rows);
  void sort_by_group(const int32_t* groups, size_t num_references);
  void sort_by_owner(Owners owners);
  void count_references();
  void place_references(const int32_t* groups, size_t num_references);

  std::vector<int64_t> row_ids_;
  std::vector<uint32_t> starts_, places_, repeated_before_, row_of_;
  std::vector<uint32_t> table_;     // of numbers of rows, kNone if free
  std::vector<uint32_t> by_group_;  // places; empty if they are by group as they come
};

}  // namespace tierstore
