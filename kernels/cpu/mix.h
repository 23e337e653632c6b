// Hashes of keys, for places in memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tierstore {

// The high half of the product maps a 64-bit hash onto 0 .. size - 1 (Lemire, "Fast random integer generation", 2019).
inline size_t reduce(uint64_t hash, size_t size) {
  return static_cast<size_t>((static_cast<unsigned __int128>(hash) * size) >> 64);
}

// The finalizer of MurmurHash3: every bit of the input changes every bit of the output half of the time.
inline uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCDull;
  value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53ull;
  return value ^ (value >> 33);
}

}  // namespace tierstore
