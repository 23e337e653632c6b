// The one copy that may race: readers copy entries while a writer, perhaps in another process, replaces them.
//
// Who copies checks the set's version afterwards and throws away what a writer touched meanwhile, so torn bytes are never
// seen. In C++ terms the race is still undefined unless every access is atomic: a release build uses plain vector moves, as
// every sequence lock does, and the ThreadSanitizer build relaxed atomics, so that it reports any *other* race.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace tierstore {

constexpr size_t kLineBytes = 64;

// Asks for memory that will be read soon.
inline void fetch(const uint8_t* start, size_t num_bytes) {
  for (size_t offset = 0; offset < num_bytes; offset += kLineBytes) __builtin_prefetch(start + offset);
}

// Copies one line; where `streamed`, past the caches, to a multiple of 16.
inline void copy_line(uint8_t* to, const uint8_t* from, [[maybe_unused]] bool streamed) {
#if defined(__SSE2__)
  if (streamed) {
    for (size_t i = 0; i < kLineBytes; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
    return;
  }
#endif
  std::memcpy(to, from, kLineBytes);
}

// Makes streamed copies visible to whoever is told of them next.
inline void end_streamed_copies() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// `next`, where not null, is as long and will be copied soon: a line of it is asked for with each line copied, so that the
// memory always has work and never more than its queues hold.
inline void racing_copy(uint8_t* to, const uint8_t* from, size_t num_bytes, const uint8_t* next = nullptr,
                        bool streamed = false) {
#if defined(__SANITIZE_THREAD__)
  (void)next, (void)streamed;
  for (size_t i = 0; i < num_bytes; ++i) {
    __atomic_store_n(to + i, __atomic_load_n(from + i, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
  }
#else
  size_t done = 0;
  for (; done + kLineBytes <= num_bytes; done += kLineBytes) {
    if (next != nullptr) __builtin_prefetch(next + done);
    copy_line(to + done, from + done, streamed);
  }
  if (next != nullptr) fetch(next + done, num_bytes - done);
  std::memcpy(to + done, from + done, num_bytes - done);
#endif
}

}  // namespace tierstore
