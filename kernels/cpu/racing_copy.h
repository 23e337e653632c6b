// The one copy that may race: readers copy entries while a writer, perhaps in another process, replaces them.
//
// Who copies checks the set's version afterwards and throws away what a writer touched meanwhile, so torn bytes are
// never seen. In C++ terms the race is still undefined unless every access is atomic: a release build uses plain vector
// moves, as every sequence lock does, and the ThreadSanitizer build relaxed atomics, so that it reports any *other*
// race.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tierstore {

constexpr size_t kLineBytes = 64;

// Asks for memory that will be read soon.
inline void fetch(const uint8_t* start, size_t num_bytes) {
  for (size_t offset = 0; offset < num_bytes; offset += kLineBytes) __builtin_prefetch(start + offset);
}

// Copies num_bytes. `next`, where not null, is as long and will be copied soon: a line of it is asked for with each
// line copied, so that the memory always has work and never more than its queues hold. `streamed` copies go past the
// caches; `to` must then be a multiple of `kStreamAlignment`, and `end_streamed_copies` comes before anybody learns of
// them.
void racing_copy(uint8_t* to, const uint8_t* from, size_t num_bytes, const uint8_t* next = nullptr,
                 bool streamed = false);

constexpr size_t kStreamAlignment = 16;  // a multiple of a line is faster

void end_streamed_copies();

}  // namespace tierstore
