#include "distinct_rows.h"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace tierstore {
namespace {

constexpr uint64_t kMultiplier = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio
constexpr unsigned kDigitBits = 8;
constexpr size_t kAheadRows = 16;  // row ids whose place in the table is asked for before it is used

// Slots for so many rows: the least power of two that they fill to a half at most.
unsigned table_bits(size_t num_references) {
  unsigned bits = 4;
  while ((size_t{1} << bits) < 2 * num_references) ++bits;
  return bits;
}

}  // namespace

size_t DistinctRows::bytes_for(size_t num_references) {
  const size_t each = sizeof(int64_t) + 5 * sizeof(uint32_t);
  return num_references * each + 2 * sizeof(uint32_t) + (size_t{1} << table_bits(num_references)) * sizeof(uint32_t);
}

BadReference DistinctRows::find(const int64_t* row_ids, const int32_t* groups, size_t num_references, int64_t num_rows,
                                Owners owners) {
  if (num_references > kReferencesMax) throw std::length_error("a batch has at most 1073741824 references");
  clear();
  try {
    const BadReference bad = hash_rows(row_ids, groups, num_references, num_rows);
    if (bad.place != kAllGood) {
      clear();
      return bad;
    }
    if (owners.count > 1) sort_by_owner(owners);
    sort_by_group(groups, num_references);
    count_references();
    place_references(groups, num_references);
    return bad;
  } catch (...) {
    clear();
    throw;
  }
}

void DistinctRows::release() { *this = DistinctRows(); }

void DistinctRows::clear() {
  for (auto* each : {&starts_, &places_, &repeated_before_, &row_of_, &by_group_}) each->clear();
  row_ids_.clear();
}

BadReference DistinctRows::hash_rows(const int64_t* row_ids, const int32_t* groups, size_t num_references,
                                     int64_t num_rows) {
  const unsigned bits = table_bits(num_references);
  const size_t mask = (size_t{1} << bits) - 1;
  row_ids_.reserve(num_references);
  row_of_.resize(num_references);
  starts_.assign(num_references + 1, 0);  // starts_[i + 1]: references of row i
  table_.resize(mask + 1);
  std::fill(table_.begin(), table_.end(), kNone);
  const auto slot_of = [bits](int64_t row_id) { return static_cast<uint64_t>(row_id) * kMultiplier >> (64 - bits); };
  for (size_t place = 0; place < num_references; ++place) {
    const int64_t row_id = row_ids[place];
    if (place + kAheadRows < num_references) __builtin_prefetch(&table_[slot_of(row_ids[place + kAheadRows])], 1);
    if (groups != nullptr && groups[place] < 0) return {place, true};
    if (row_id == kNoRow) {
      row_of_[place] = kNone;
      continue;
    }
    if (row_id < 0 || row_id >= num_rows) return {place, false};
    size_t slot = slot_of(row_id);
    while (table_[slot] != kNone && row_ids_[table_[slot]] != row_id) slot = (slot + 1) & mask;
    if (table_[slot] == kNone) {
      table_[slot] = static_cast<uint32_t>(row_ids_.size());
      row_ids_.push_back(row_id);
    }
    row_of_[place] = table_[slot];
    ++starts_[table_[slot] + 1];
  }
  starts_.resize(row_ids_.size() + 1);
  return {kAllGood, false};
}

// A stable radix sort; digits that all groups share are skipped.
void DistinctRows::sort_by_group(const int32_t* groups, size_t num_references) {
  if (groups == nullptr || std::is_sorted(groups, groups + num_references)) return;
  by_group_.resize(num_references);
  places_.resize(num_references);
  for (size_t i = 0; i < num_references; ++i) by_group_[i] = static_cast<uint32_t>(i);
  const int32_t most = *std::max_element(groups, groups + num_references);
  for (unsigned shift = 0; shift < 31 && most >> shift != 0; shift += kDigitBits) {
    std::array<uint32_t, (1 << kDigitBits) + 1> starts{};
    const auto digit = [&](uint32_t place) { return static_cast<uint32_t>(groups[place]) >> shift & 0xff; };
    for (const uint32_t place : by_group_) ++starts[digit(place) + 1];
    for (size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];
    for (const uint32_t place : by_group_) places_[starts[digit(place)]++] = place;
    by_group_.swap(places_);
  }
}

// A counting sort, stable; starts_[i + 1] still is the number of references to row i.
void DistinctRows::sort_by_owner(Owners owners) {
  const size_t count = row_ids_.size();
  const int64_t* ends = owners.starts + 1;
  std::vector<uint32_t> next(owners.count + 1, 0), new_of(count);
  for (size_t i = 0; i < count; ++i) {
    new_of[i] = static_cast<uint32_t>(std::upper_bound(ends, ends + owners.count - 1, row_ids_[i]) - ends);
    ++next[new_of[i] + 1];
  }
  for (size_t owner = 1; owner < owners.count; ++owner) next[owner] += next[owner - 1];
  for (size_t i = 0; i < count; ++i) new_of[i] = next[new_of[i]]++;
  std::vector<int64_t> row_ids(count);
  std::vector<uint32_t> starts(count + 1, 0);
  for (size_t i = 0; i < count; ++i) {
    row_ids[new_of[i]] = row_ids_[i];
    starts[new_of[i] + 1] = starts_[i + 1];
  }
  row_ids_.swap(row_ids);
  starts_.swap(starts);
  for (uint32_t& row : row_of_)
    if (row != kNone) row = new_of[row];
}

void DistinctRows::count_references() {
  const size_t count = row_ids_.size();
  repeated_before_.resize(count + 1);
  uint32_t repeated = 0;
  for (size_t i = 0; i < count; ++i) {
    repeated_before_[i] = repeated;
    repeated += starts_[i + 1] > 1 ? 1 : 0;
  }
  repeated_before_[count] = repeated;
  for (size_t i = 0; i < count; ++i) starts_[i + 1] += starts_[i];
}

// While places are dealt out, starts_[i] is where the next one of row i goes: in the end, where row i + 1 starts.
void DistinctRows::place_references(const int32_t* groups, size_t num_references) {
  const size_t count = row_ids_.size();
  places_.resize(starts_[count]);
  const auto deal = [&](uint32_t place) {
    const uint32_t row = row_of_[place];
    if (row != kNone) places_[starts_[row]++] = place;
  };
  if (by_group_.empty()) {
    for (size_t place = 0; place < num_references; ++place) deal(static_cast<uint32_t>(place));
  } else {
    for (const uint32_t place : by_group_) deal(place);
  }
  for (size_t i = count; i > 0; --i) starts_[i] = starts_[i - 1];
  starts_[0] = 0;
  if (groups == nullptr) return;
  for (size_t i = 0; i < count; ++i) {
    for (size_t at = starts_[i + 1] - 1; at > starts_[i]; --at) {
      if (groups[places_[at]] != groups[places_[at - 1]]) places_[at] |= kNewGroup;
    }
  }
}

}  // namespace tierstore
