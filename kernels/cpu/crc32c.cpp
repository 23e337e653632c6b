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
// The instruction takes three cycles, and one can begin in each: so three parts of the data go side by side, and are
// joined, since states are linear over GF(2): the state of A and B is that of A and as many zeros as B is long, plus
// that of B alone. After Gopal et al., "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction", 2011; their
// joining multiplication is tables here. Four rounds are nearly a page of 4 KiB, two a record of V4.1's.
constexpr size_t kPartBytes = 336;

// What kPartBytes zeros make of a state, by each of its bytes.
using Shift = std::array<std::array<uint32_t, 256>, 4>;

Shift make_shift() {
  const std::array<uint8_t, kPartBytes> zeros{};
  Shift shift{};
  for (size_t byte = 0; byte < shift.size(); ++byte) {
    for (uint32_t value = 1; value < 256; ++value) {
      const uint32_t lowest = value & (0u - value);
      shift[byte][value] = value == lowest ? update_table(value << (8 * byte), zeros.data(), zeros.size())
                                           : shift[byte][lowest] ^ shift[byte][value ^ lowest];
    }
  }
  return shift;
}

uint32_t shifted(const Shift& shift, uint64_t state) {
  return shift[0][state & 0xFF] ^ shift[1][state >> 8 & 0xFF] ^ shift[2][state >> 16 & 0xFF] ^ shift[3][state >> 24];
}

__attribute__((target("sse4.2"))) uint32_t update_sse42(uint32_t state, const uint8_t* data, size_t num_bytes) {
  static const Shift shift = make_shift();
  uint64_t wide = state;
  for (; num_bytes >= 3 * kPartBytes; num_bytes -= 3 * kPartBytes, data += 3 * kPartBytes) {
    uint64_t second = 0, third = 0;
    for (size_t at = 0; at < kPartBytes; at += 8) {
      wide = _mm_crc32_u64(wide, load_u64(data + at));
      second = _mm_crc32_u64(second, load_u64(data + kPartBytes + at));
      third = _mm_crc32_u64(third, load_u64(data + 2 * kPartBytes + at));
    }
    wide = shifted(shift, shifted(shift, wide) ^ second) ^ third;
  }
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
