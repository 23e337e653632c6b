// The one copy that may race: readers copy entries while a writer, perhaps in another process, replaces them.
//
// Who copies checks the set's version afterwards and throws away what a writer touched meanwhile, so torn bytes are never
// seen. In C++ terms the race is still undefined unless every access is atomic: a release build uses plain vector moves, as
// every sequence lock does, and the ThreadSanitizer build relaxed atomics, so that it reports any *other* race.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tierstore {

inline void racing_copy(uint8_t* to, const uint8_t* from, size_t num_bytes) {
#if defined(__SANITIZE_THREAD__)
  for (size_t i = 0; i < num_bytes; ++i) {
    __atomic_store_n(to + i, __atomic_load_n(from + i, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
  }
#else
  std::memcpy(to, from, num_bytes);
#endif
}

}  // namespace tierstore
