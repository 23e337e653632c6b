// What the recency cache would do: the very code that serves, over recorded accesses and without entries.
#pragma once

#include <cstddef>
#include <cstdint>

#include "entry_cache.h"

namespace tierstore {

constexpr size_t kSimulatedOrdersMax = size_t{1} << kTagShift;

// Accesses to one table, in batches as they were looked up. Access i is to key keys[i] of order order_index[i]; batch b
// ends before access batch_ends[b].
struct Accesses {
  const uint8_t* order_index;  // below kSimulatedOrdersMax
  const int64_t* keys;         // -1: not looked up
  const int64_t* batch_ends;   // ascending, the last being the number of accesses
  size_t num_batches;
};

// Writes for each access whether a cache of `num_sets` sets, empty at first, would have held its entry. Throws
// std::bad_alloc where there is no memory for 256 bytes a set.
void simulate_cache(const Accesses& accesses, size_t num_sets, bool* hits);

}  // namespace tierstore
