#include "racing_copy.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tierstore {
namespace {

using CopyLine = void (*)(uint8_t* to, const uint8_t* from);

inline __attribute__((always_inline)) void plain_line(uint8_t* to, const uint8_t* from) {
  std::memcpy(to, from, kLineBytes);
}

template <CopyLine copy_line>
inline __attribute__((always_inline)) void copy_lines(uint8_t* to, const uint8_t* from, size_t num_bytes,
                                                      const uint8_t* next) {
  size_t done = 0;
  for (; done + kLineBytes <= num_bytes; done += kLineBytes) {
    if (next != nullptr) __builtin_prefetch(next + done);
    copy_line(to + done, from + done);
  }
  if (next != nullptr) fetch(next + done, num_bytes - done);
  std::memcpy(to + done, from + done, num_bytes - done);
}

void copy_plain(uint8_t* to, const uint8_t* from, size_t num_bytes, const uint8_t* next) {
  copy_lines<plain_line>(to, from, num_bytes, next);
}

#if defined(__x86_64__)
inline __attribute__((always_inline)) void sse2_line(uint8_t* to, const uint8_t* from) {
  for (size_t i = 0; i < kLineBytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
}

void stream_sse2(uint8_t* to, const uint8_t* from, size_t num_bytes, const uint8_t* next) {
  copy_lines<sse2_line>(to, from, num_bytes, next);
}

// A store of a whole line leaves at once, where four of a quarter each wait to be put together.
__attribute__((target("avx512f"))) void stream_avx512(uint8_t* to, const uint8_t* from, size_t num_bytes,
                                                      const uint8_t* next) {
  size_t done = 0;
  for (; done + kLineBytes <= num_bytes; done += kLineBytes) {
    if (next != nullptr) __builtin_prefetch(next + done);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + done), _mm512_loadu_si512(from + done));
  }
  if (next != nullptr) fetch(next + done, num_bytes - done);
  std::memcpy(to + done, from + done, num_bytes - done);
}

bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
#endif

void copy_streamed(uint8_t* to, const uint8_t* from, size_t num_bytes, const uint8_t* next) {
#if defined(__x86_64__)
  static const bool wide = has_avx512();
  const bool whole_lines = reinterpret_cast<uintptr_t>(to) % kLineBytes == 0;
  (wide && whole_lines ? stream_avx512 : stream_sse2)(to, from, num_bytes, next);
#else
  copy_plain(to, from, num_bytes, next);
#endif
}

}  // namespace

void racing_copy(uint8_t* to, const uint8_t* from, size_t num_bytes, [[maybe_unused]] const uint8_t* next,
                 [[maybe_unused]] bool streamed) {
#if defined(__SANITIZE_THREAD__)
  for (size_t i = 0; i < num_bytes; ++i) {
    __atomic_store_n(to + i, __atomic_load_n(from + i, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
  }
#else
  (streamed ? copy_streamed : copy_plain)(to, from, num_bytes, next);
#endif
}

void end_streamed_copies() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace tierstore
