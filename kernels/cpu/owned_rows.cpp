#include "owned_rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "gradient_sums.h"
#include "shared_rows.h"

namespace tierstore {
namespace {

constexpr size_t kBytesEach = 1 << 17;  // of a range of rows that a thread takes: some 20 us
constexpr size_t kPrefetchRows = 4;     // references whose rows are asked for ahead

void require_ascending(const int32_t* groups, size_t num_references) {
  if (groups == nullptr || num_references == 0) return;
  if (groups[0] < 0) throw std::invalid_argument("groups[0] is negative");
  for (size_t i = 1; i < num_references; ++i)
    if (groups[i] < groups[i - 1]) throw std::invalid_argument("groups must ascend along a batch");
}

size_t rows_each(size_t row_bytes) { return kBytesEach / std::max<size_t>(row_bytes, 1) + 1; }

}  // namespace

OwnedRows::OwnedRows(const int64_t* row_ids, const int32_t* groups, size_t num_references, const int64_t* starts,
                     size_t num_owners) {
  require_ascending(groups, num_references);
  const BadReference bad = rows_.find(row_ids, nullptr, num_references, starts[num_owners], {starts, num_owners});
  if (bad.place != kAllGood)
    throw std::invalid_argument("row_ids[" + std::to_string(bad.place) + "] is " + std::to_string(row_ids[bad.place]) +
                                ", must be -1 or at least 0 and below " + std::to_string(starts[num_owners]));
  counts_.resize(num_owners);
  size_t row = 0;
  for (size_t owner = 0; owner < num_owners; ++owner) {
    const size_t first = row;
    while (row < rows_.count() && rows_.row_ids()[row] < starts[owner + 1]) ++row;
    counts_[owner] = static_cast<int64_t>(row - first);
  }
  if (groups != nullptr && num_references > 0) num_groups_ = static_cast<size_t>(groups[num_references - 1]) + 1;
  if (num_groups_ == 1)
    sum_counts_ = counts_;
  else
    find_sums(groups, num_references);
}

// A pair is numbered so that an owner's pairs are one range: of owner w, first[w] + group * counts_[w] + its row there.
void OwnedRows::find_sums(const int32_t* groups, size_t num_references) {
  const size_t num_owners = counts_.size();
  std::vector<int64_t> row_start(num_owners + 1, 0), first(num_owners + 1, 0), pairs(num_references, kNoRow);
  for (size_t owner = 0; owner < num_owners; ++owner) {
    row_start[owner + 1] = row_start[owner] + counts_[owner];
    first[owner + 1] = row_start[owner + 1] * static_cast<int64_t>(num_groups_);
  }
  std::vector<uint32_t> owner_of(rows_.count());
  for (size_t owner = 0; owner < num_owners; ++owner)
    std::fill(owner_of.begin() + row_start[owner], owner_of.begin() + row_start[owner + 1],
              static_cast<uint32_t>(owner));
  for (size_t i = 0; i < num_references; ++i) {
    const uint32_t row = rows_.row_of()[i];
    if (row == DistinctRows::kNone) continue;
    const uint32_t owner = owner_of[row];
    pairs[i] = first[owner] + groups[i] * counts_[owner] + (row - row_start[owner]);
  }
  sums_.find(pairs.data(), nullptr, num_references, first[num_owners], {first.data(), num_owners});
  sum_counts_.assign(num_owners * num_groups_, 0);
  rows_of_sums_.resize(sums_.count());
  size_t owner = 0;
  for (size_t i = 0; i < sums_.count(); ++i) {
    while (sums_.row_ids()[i] >= first[owner + 1]) ++owner;
    const int64_t in_owner = sums_.row_ids()[i] - first[owner];
    rows_of_sums_[i] = static_cast<uint32_t>(in_owner % counts_[owner]);
    ++sum_counts_[owner * num_groups_ + static_cast<size_t>(in_owner / counts_[owner])];
  }
}

void OwnedRows::expand(const uint8_t* values, size_t row_bytes, uint8_t* out, size_t num_threads) const {
  const uint32_t* row_of = rows_.row_of();
  const size_t num_references = rows_.num_references();
  share_rows(num_references, rows_each(row_bytes), num_threads, [&](size_t start, size_t end) {
    for (size_t i = start; i < end; ++i) {
      if (i + kPrefetchRows < end && row_of[i + kPrefetchRows] != DistinctRows::kNone) {
        const uint8_t* later = values + row_of[i + kPrefetchRows] * row_bytes;
        for (size_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(later + at, 0);
      }
      if (row_of[i] == DistinctRows::kNone)
        std::memset(out + i * row_bytes, 0, row_bytes);
      else
        std::memcpy(out + i * row_bytes, values + row_of[i] * row_bytes, row_bytes);
    }
  });
}

void OwnedRows::sum(const float* gradients, size_t dim, float scale, float* out, size_t num_threads) const {
  const Gradients given{gradients, dim, dim, scale};
  const DistinctRows& distinct = num_groups_ == 1 ? rows_ : sums_;
  share_rows(distinct.count(), rows_each(dim * sizeof(float)), num_threads,
             [&](size_t start, size_t end) { sum_gradients(distinct, given, start, end, out + start * dim); });
}

}  // namespace tierstore
