#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#endif

namespace tierstore {
namespace {

using Update = uint32_t (*)(uint32_t state, const uint8_t* data, size_t num_bytes);

uint64_t load_u64(const uint8_t* data) {
  uint64_t value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t state = byte;
    for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ (0x82F63B78u & (0u - (state & 1u)));
    table[byte] = state;
  }
  return table;
}

uint32_t update_table(uint32_t state, const uint8_t* data, size_t num_bytes) {
  static const std::array<uint32_t, 256> table = make_table();
  for (size_t i = 0; i < num_bytes; ++i) state = (state >> 8) ^ table[(state ^ data[i]) & 0xFF];
  return state;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t update_sse42(uint32_t state, const uint8_t* data, size_t num_bytes) {
  uint64_t wide = state;
  for (; num_bytes >= 8; num_bytes -= 8, data += 8) wide = _mm_crc32_u64(wide, load_u64(data));
  state = static_cast<uint32_t>(wide);
  for (; num_bytes > 0; --num_bytes, ++data) state = _mm_crc32_u8(state, *data);
  return state;
}
#elif defined(__aarch64__)
__attribute__((target("+crc"))) uint32_t update_armv8(uint32_t state, const uint8_t* data, size_t num_bytes) {
  for (; num_bytes >= 8; num_bytes -= 8, data += 8) state = __crc32cd(state, load_u64(data));
  for (; num_bytes > 0; --num_bytes, ++data) state = __crc32cb(state, *data);
  return state;
}
#endif

struct Backend {
  const char* name;
  Update update;
};

Backend choose_backend() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return {"sse4.2", update_sse42};
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_CRC32) return {"armv8-crc", update_armv8};
#endif
  return {"table", update_table};
}

const Backend& backend() {
  static const Backend chosen = choose_backend();
  return chosen;
}

}  // namespace

const char* crc32c_backend() { return backend().name; }

uint32_t crc32c(const uint8_t* data, size_t num_bytes, uint32_t seed) {
  return ~backend().update(~seed, data, num_bytes);
}

}  // namespace tierstore
