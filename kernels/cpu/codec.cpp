#include "codec.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

namespace tierstore {
namespace {

// A table and not arithmetic on bits: exact for subnormals whether the thread flushes its own to zero or not.
std::array<float, 256> fp8_values() {
  std::array<float, 256> values{};
  for (int byte = 0; byte < 256; ++byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    const float magnitude = (byte & 0x7f) == 0x7f ? std::numeric_limits<float>::quiet_NaN()
                            : exponent == 0       ? std::ldexp(static_cast<float>(mantissa), -9)
                                                  : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    values[byte] = (byte & 0x80) != 0 ? -magnitude : magnitude;
  }
  return values;
}

const std::array<float, 256> kFp8 = fp8_values();

// The exponent field of a float32 has the same bias, so that all bytes but two only move to its place.
float e8m0_value(uint8_t byte) {
  const uint32_t bits = byte == 0 ? 0x00400000u : byte == 255 ? 0x7fc00000u : static_cast<uint32_t>(byte) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Half to even. The NaNs that come here are those of the two functions above: their low bits are 0, so nothing carries.
inline uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void decode(const uint8_t* values, size_t count, float scale, uint16_t* out) {
  float found[kScaleBlock];  // apart from the rest, which the compiler makes vectors of
  for (size_t i = 0; i < count; ++i) found[i] = kFp8[values[i]];
  for (size_t i = 0; i < count; ++i) out[i] = bfloat16_bits(found[i] * scale);
}

}  // namespace

void decode_fp8_rows(const uint8_t* rows, size_t num_rows, size_t row_bytes, size_t dim, const float* scale,
                     uint16_t* out) {
  for (size_t row = 0; row < num_rows; ++row, rows += row_bytes, out += dim) {
    for (size_t start = 0; start < dim; start += kScaleBlock) {
      const float factor = scale != nullptr ? *scale : e8m0_value(rows[dim + start / kScaleBlock]);
      const size_t left = dim - start;
      if (left >= kScaleBlock) {
        decode(rows + start, kScaleBlock, factor, out + start);  // of a length that the compiler knows
      } else {
        decode(rows + start, left, factor, out + start);
      }
    }
  }
}

}  // namespace tierstore
