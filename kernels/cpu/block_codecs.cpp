#include "block_codecs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "block_leaves.h"

namespace tierstore {
namespace {

using leaves::Blocks;
using leaves::Bytes;
using leaves::Leaves;
using leaves::Order;

constexpr float kFp4Codes[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3, -4, -6};
constexpr float kUint4b8Codes[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float kIq4NlCodes[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr float kNf4Codes[16] = {// bitsandbytes' quantiles of a normal distribution
                                 -1.0f,
                                 -0.6961928009986877f,
                                 -0.5250730514526367f,
                                 -0.39491748809814453f,
                                 -0.28444138169288635f,
                                 -0.18477343022823334f,
                                 -0.09105003625154495f,
                                 0.0f,
                                 0.07958029955625534f,
                                 0.16093020141124725f,
                                 0.24611230194568634f,
                                 0.33791524171829224f,
                                 0.44070982933044434f,
                                 0.5626170039176941f,
                                 0.7229568362236023f,
                                 1.0f};

constexpr size_t kScalesAtOnce = 64;  // of a row, decoded before its values

struct GgufBlock {
  size_t values, bytes;
};

GgufBlock gguf_block(Values values) {
  switch (values) {
    case Values::kQ8_0:
      return {32, 34};
    case Values::kQ4_0:
    case Values::kIq4Nl:
      return {32, 18};
    case Values::kQ4K:
      return {256, 144};
    default:
      return {0, 0};
  }
}

bool is_half_byte(Values values) {
  return values == Values::kFp4 || values == Values::kUint4b8 || values == Values::kNf4;
}

size_t scale_bytes(Scale scale) {
  switch (scale) {
    case Scale::kE8m0:
    case Scale::kE4m3:
      return 1;
    case Scale::kBf16:
    case Scale::kFp16:
      return 2;
    case Scale::kFp32:
      return 4;
    default:
      return 0;
  }
}

float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Not by the processor's conversion: exact for subnormals whether the thread flushes its own to zero or not.
float float16_value(const uint8_t* at) {
  const uint32_t bits = at[0] | static_cast<uint32_t>(at[1]) << 8;
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  const float magnitude = exponent == 31  ? float_of_bits(mantissa == 0 ? 0x7f800000u : 0x7fc00000u)
                          : exponent == 0 ? static_cast<float>(static_cast<int>(mantissa)) * 0x1p-24f
                                          : float_of_bits((exponent + 112) << 23 | mantissa << 13);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// Scales by the table's factor; of any NaN the one whose low bits are 0, because rounding must not carry.
template <typename Value>
void finish_scales(const BlockCodec& codec, size_t count, float* out, Value value) {
  const float factor = codec.factor;
  const auto finish = [&](size_t i, float scale) {
    out[i] = std::isnan(scale) ? std::numeric_limits<float>::quiet_NaN() : scale;
  };
  if (codec.divides) {
    for (size_t i = 0; i < count; ++i) finish(i, value(i) / factor);
  } else {
    for (size_t i = 0; i < count; ++i) finish(i, value(i) * factor);
  }
}

// Scales as float32, each `stride` bytes after the one before; 0x400000 is 2^-127.
void read_scales(const BlockCodec& codec, const uint8_t* at, size_t stride, size_t count, float* out) {
  const auto by = [&](auto value) {
    finish_scales(codec, count, out, [&](size_t i) { return value(at + i * stride); });
  };
  switch (codec.scale) {
    case Scale::kE8m0:
      return by([](const uint8_t* byte) {
        return float_of_bits(*byte == 0 ? 0x00400000u : *byte == 255 ? 0x7fc00000u : uint32_t{*byte} << 23);
      });
    case Scale::kE4m3:
      return by([](const uint8_t* byte) { return leaves::Fp8Value()(*byte); });
    case Scale::kFp16:
      return by(float16_value);
    case Scale::kBf16:
      return by([](const uint8_t* two) { return float_of_bits(uint32_t{two[0]} << 16 | uint32_t{two[1]} << 24); });
    default:
      return by([](const uint8_t* four) {
        float value;
        std::memcpy(&value, four, sizeof value);
        return value;
      });
  }
}

void decode_blocks(const Leaves& with, Values values, const Blocks& blocks) {
  const auto in = [&](Order order) { return with.halves[static_cast<int>(order)]; };
  const auto as = [&](Bytes bytes) { return with.bytes[static_cast<int>(bytes)]; };
  switch (values) {
    case Values::kFp8:
      return as(Bytes::kFp8)(blocks);
    case Values::kInt8:
    case Values::kQ8_0:
      return as(Bytes::kInt8)(blocks);
    case Values::kUint8b128:
      return as(Bytes::kUint8b128)(blocks);
    case Values::kFp4:
      return in(Order::kLowFirst)(blocks, kFp4Codes);
    case Values::kUint4b8:
      return in(Order::kLowFirst)(blocks, kUint4b8Codes);
    case Values::kNf4:
      return in(Order::kHighFirst)(blocks, kNf4Codes);
    case Values::kQ4_0:
      return in(Order::kHalves)(blocks, kUint4b8Codes);
    case Values::kIq4Nl:
      return in(Order::kHalves)(blocks, kIq4NlCodes);
    case Values::kQ4K:
      return;  // decode_q4_k
  }
}

// One row: values, then their scales.
void decode_planes(const Leaves& with, const BlockCodec& codec, const uint8_t* row, size_t dim, uint16_t* out) {
  const size_t num_blocks = dim / codec.block, stride = is_half_byte(codec.values) ? codec.block / 2 : codec.block;
  const size_t bytes_each = scale_bytes(codec.scale);
  const uint8_t* at = row + num_blocks * stride;
  float scales[kScalesAtOnce];
  for (size_t start = 0; start < num_blocks; start += kScalesAtOnce) {
    const size_t count = std::min(kScalesAtOnce, num_blocks - start);
    read_scales(codec, at + start * bytes_each, bytes_each, count, scales);
    decode_blocks(with, codec.values,
                  {row + start * stride, stride, codec.block, count, scales, out + start * codec.block});
  }
}

// Rows of one scale each, which are blocks of a long row: many at once, since a row alone costs as much as its values.
void decode_whole_rows(const Leaves& with, const BlockCodec& codec, const uint8_t* rows, size_t num_rows,
                       size_t row_stride, size_t dim, uint16_t* out) {
  const size_t scale_start = is_half_byte(codec.values) ? dim / 2 : dim;
  float scales[kScalesAtOnce];
  for (size_t start = 0; start < num_rows; start += kScalesAtOnce, rows += kScalesAtOnce * row_stride) {
    const size_t count = std::min(kScalesAtOnce, num_rows - start);
    read_scales(codec, rows + scale_start, row_stride, count, scales);
    decode_blocks(with, codec.values, {rows, row_stride, dim, count, scales, out + start * dim});
  }
}

// Blocks that begin with a float16 scale.
void decode_gguf(const Leaves& with, Values values, const uint8_t* row, size_t dim, uint16_t* out) {
  const GgufBlock block = gguf_block(values);
  const size_t num_blocks = dim / block.values;
  float scales[kScalesAtOnce];
  for (size_t start = 0; start < num_blocks; start += kScalesAtOnce) {
    const size_t count = std::min(kScalesAtOnce, num_blocks - start);
    const uint8_t* first = row + start * block.bytes;
    for (size_t i = 0; i < count; ++i) scales[i] = float16_value(first + i * block.bytes);
    decode_blocks(with, values, {first + 2, block.bytes, block.values, count, scales, out + start * block.values});
  }
}

// Two float16s, of 8 scales and of 8 minima, both of 6 bits, in 12 bytes; then 128 bytes of values.
void decode_q4_k(const Leaves& with, const uint8_t* row, size_t dim, uint16_t* out) {
  const GgufBlock block = gguf_block(Values::kQ4K);
  for (size_t start = 0; start < dim; start += block.values, row += block.bytes) {
    const float scale = float16_value(row), minimum = float16_value(row + 2);
    const uint8_t* packed = row + 4;
    float scales[8], minima[8];
    for (int i = 0; i < 4; ++i) {
      scales[i] = scale * static_cast<float>(packed[i] & 63);
      minima[i] = minimum * static_cast<float>(packed[4 + i] & 63);
      scales[4 + i] = scale * static_cast<float>((packed[8 + i] & 15) | packed[i] >> 6 << 4);
      minima[4 + i] = minimum * static_cast<float>(packed[8 + i] >> 4 | packed[4 + i] >> 6 << 4);
    }
    with.q4_k(packed + 12, scales, minima, out + start);
  }
}

template <typename Named, size_t size>
std::optional<Named> find(const std::pair<std::string_view, Named> (&names)[size], std::string_view name) {
  for (const auto& [known, value] : names) {
    if (known == name) return value;
  }
  return std::nullopt;
}

}  // namespace

std::optional<Values> values_named(std::string_view name) {
  static constexpr std::pair<std::string_view, Values> kNames[] = {
      {"fp8_e4m3", Values::kFp8},        {"fp4_e2m1", Values::kFp4},    {"int8", Values::kInt8},
      {"uint8b128", Values::kUint8b128}, {"uint4b8", Values::kUint4b8}, {"nf4", Values::kNf4},
      {"gguf_q8_0", Values::kQ8_0},      {"gguf_q4_0", Values::kQ4_0},  {"gguf_iq4_nl", Values::kIq4Nl},
      {"gguf_q4_k", Values::kQ4K}};
  return find(kNames, name);
}

std::optional<Scale> scale_named(std::string_view name) {
  static constexpr std::pair<std::string_view, Scale> kNames[] = {{"", Scale::kNone},     {"e8m0", Scale::kE8m0},
                                                                  {"e4m3", Scale::kE4m3}, {"bf16", Scale::kBf16},
                                                                  {"fp16", Scale::kFp16}, {"fp32", Scale::kFp32}};
  return find(kNames, name);
}

size_t block_row_bytes(const BlockCodec& codec, size_t dim) {
  if (dim == 0 || codec.block == 0 || dim % codec.block != 0) return 0;
  const GgufBlock block = gguf_block(codec.values);
  if (block.values != 0) {
    return codec.scale == Scale::kNone && codec.block == block.values ? dim / block.values * block.bytes : 0;
  }
  if (codec.scale == Scale::kNone || (is_half_byte(codec.values) && codec.block % 2 != 0)) return 0;
  return (is_half_byte(codec.values) ? dim / 2 : dim) + dim / codec.block * scale_bytes(codec.scale);
}

void decode_block_rows(const BlockCodec& codec, const uint8_t* rows, size_t num_rows, size_t row_stride, size_t dim,
                       bool plain, uint16_t* out) {
  const Leaves& with = plain ? leaves::kPlain : leaves::fastest();
  if (codec.scale != Scale::kNone && codec.block == dim) {
    return decode_whole_rows(with, codec, rows, num_rows, row_stride, dim, out);
  }
  for (size_t row = 0; row < num_rows; ++row, rows += row_stride, out += dim) {
    if (codec.values == Values::kQ4K) {
      decode_q4_k(with, rows, dim, out);
    } else if (codec.scale == Scale::kNone) {
      decode_gguf(with, codec.values, rows, dim, out);
    } else {
      decode_planes(with, codec, rows, dim, out);
    }
  }
}

}  // namespace tierstore
