// Reuse distances: how large a cache that keeps what was used last must be to hit each access.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tierstore {

// Writes for each access how many distinct other items were accessed since the last access to the same one, -1 for an
// item's first access. Items are 0 to num_accesses - 1. Memory: 8 bytes an item, and a quarter of a byte an access.
void stack_distances(const int64_t* items, size_t num_accesses, int64_t* out);

}  // namespace tierstore
