// Counts of keys by (table, order, key), in a fixed piece of memory: which ones a host asks for often, as far as it was
// reported.
//
// Memory is sets of one cache line, four slots each; a key belongs to one set, by its hash. A new key takes an empty
// slot. Without such a slot its weight goes off the set's smallest count, and what is left of it when that count is
// gone takes the slot (after Misra and Gries, "Finding repeated elements", 1982, who take it off all counts; off the
// smallest, so that keys that come once wear down nothing that is counted often). So a count never says more than there
// was, and a set never more than four keys. Counts saturate, and are halved by `age`, so that what was hot once makes
// way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "reports.h"

namespace tierstore {

constexpr size_t kCountSlots = 4;

// A count of 0: empty, and then all of it is 0.
struct KeyCount {
  int64_t key;
  uint32_t count;
  uint16_t table;
  uint8_t order;
  uint8_t unused;
};

struct alignas(64) KeyCountSet {
  KeyCount slots[kCountSlots];
};
static_assert(sizeof(KeyCountSet) == 64, "a cache line");

// Sets from `begin` to `end`, or to the last one.
struct SetRange {
  size_t begin = 0;
  size_t end = SIZE_MAX;
};

// Where `copy_above` writes: room for `size` keys.
struct CountedKeys {
  uint8_t* order_index;
  int64_t* keys;
  uint32_t* counts;
  size_t size;
};

// Any thread may call anything; one call at a time is at work.
class KeyCounts {
 public:
  // `memory` has num_sets sets, at a multiple of 64, is emptied, and outlives the counts.
  KeyCounts(uint8_t* memory, size_t num_sets);

  // Counts reports by their weights; keys below 0 are not keys. Returns how many were of keys.
  size_t add(const Report* reports, size_t num_reports);

  // Writes the count of each key of a table, 0 where it has none. `orders` has one for each key, or one for all.
  void counts(uint16_t table, const uint8_t* orders, bool one_order, const int64_t* keys, size_t num_keys,
              uint32_t* out) const;

  // Halves all counts; a count of 1 is gone.
  void age();

  // How many keys of a table in some of the sets were counted at least `minimum`, 1 or more, times; and these, in no
  // order, as many as fit.
  size_t num_above(uint16_t table, uint32_t minimum, SetRange sets) const;
  size_t copy_above(uint16_t table, uint32_t minimum, SetRange sets, const CountedKeys& out) const;

  // Keys that have a count now, of all tables.
  size_t num_used() const;
  size_t num_sets() const { return num_sets_; }

 private:
  KeyCountSet& set_of(uint16_t table, uint8_t order, int64_t key) const;
  void count(const Report& report);

  KeyCountSet* sets_;
  size_t num_sets_;
  size_t num_used_ = 0;
  mutable std::mutex at_work_;
};

}  // namespace tierstore
