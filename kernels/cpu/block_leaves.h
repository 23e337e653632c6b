// The inner loops of block_codecs.cpp: blocks of one row, whose scales are float32 already, into bfloat16.
//
// Half-byte values of a block are looked up in a table of the 16 products, each computed and rounded once.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tierstore::leaves {

// Blocks of `count` values each; block b starts at values + b * stride. value = code * scales[b] - minima[b].
struct Blocks {
  const uint8_t* values;
  size_t stride, count, num_blocks;
  const float* scales;
  uint16_t* out;  // [num_blocks, count]
};

enum class Order { kLowFirst, kHighFirst, kHalves };  // kHalves: all low halves of a block, then all high ones
enum class Bytes { kFp8, kInt8, kUint8b128 };

// Half to even. A NaN that comes here, of a value or a scale, is the quiet one of low bits 0, so that nothing carries.
inline uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// What a processor has: one set of loops for every machine, one for those with AVX2.
struct Leaves {
  void (*halves[3])(const Blocks& blocks, const float* codes);  // by Order; codes: the values of the 16 codes
  void (*bytes[3])(const Blocks& blocks);                       // by Bytes
  // One block of 256 values: groups of 32 with scales[8] and minima[8]; two groups share 32 bytes, low halves first.
  void (*q4_k)(const uint8_t* values, const float* scales, const float* minima, uint16_t* out);
};

extern const Leaves kPlain;
const Leaves& fastest();  // kPlain, or what this processor has

// Bodies that the compiler makes vectors of, for the instructions of the function that they are inlined into.

extern const std::array<float, 256> kFp8Values;  // a table: exact for subnormals even if the thread flushes its own

struct Fp8Value {
  static constexpr bool kByTable = true;
  float operator()(uint8_t byte) const { return kFp8Values[byte]; }
};
struct Int8Value {
  static constexpr bool kByTable = false;
  float operator()(uint8_t byte) const { return static_cast<float>(static_cast<int8_t>(byte)); }
};
struct Uint8Value {
  static constexpr bool kByTable = false;
  float operator()(uint8_t byte) const { return static_cast<float>(static_cast<int>(byte) - 128); }
};

template <typename Value>
inline __attribute__((always_inline)) void scale_bytes(const uint8_t* values, size_t count, float scale,
                                                       uint16_t* out) {
  if constexpr (Value::kByTable) {  // apart from the rest, which the compiler makes vectors of
    float found[32];
    for (size_t start = 0; start < count; start += 32) {
      const size_t end = count - start < 32 ? count - start : 32;
      for (size_t i = 0; i < end; ++i) found[i] = Value()(values[start + i]);
      for (size_t i = 0; i < end; ++i) out[start + i] = bfloat16_bits(found[i] * scale);
    }
  } else {
    for (size_t i = 0; i < count; ++i) out[i] = bfloat16_bits(Value()(values[i]) * scale);
  }
}

template <typename Value>
inline __attribute__((always_inline)) void scale_all_bytes(const Blocks& blocks) {
  for (size_t b = 0; b < blocks.num_blocks; ++b) {
    const uint8_t* values = blocks.values + b * blocks.stride;
    uint16_t* out = blocks.out + b * blocks.count;
    if (blocks.count == 32) {
      scale_bytes<Value>(values, 32, blocks.scales[b], out);  // of a length that the compiler knows
    } else {
      scale_bytes<Value>(values, blocks.count, blocks.scales[b], out);
    }
  }
}

inline __attribute__((always_inline)) void products(const float* codes, float scale, float minimum, uint16_t* table) {
  for (int code = 0; code < 16; ++code) table[code] = bfloat16_bits(codes[code] * scale - minimum);
}

// Looks up the halves of bytes[start .. end) of a block.
template <Order order>
inline __attribute__((always_inline)) void look_up(const uint8_t* bytes, size_t start, size_t end, size_t num_bytes,
                                                   const uint16_t* table, uint16_t* out) {
  for (size_t i = start; i < end; ++i) {
    const uint16_t low = table[bytes[i] & 15], high = table[bytes[i] >> 4];
    if (order == Order::kHalves) {
      out[i] = low;
      out[num_bytes + i] = high;
    } else {
      out[2 * i] = order == Order::kLowFirst ? low : high;
      out[2 * i + 1] = order == Order::kLowFirst ? high : low;
    }
  }
}

}  // namespace tierstore::leaves
