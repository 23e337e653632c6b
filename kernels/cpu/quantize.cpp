#include "quantize.h"

#include <algorithm>
#include <cmath>

#include "codec.h"
#include "float_rules.h"

namespace tierstore {
namespace {

constexpr uint32_t kSign = 0x80000000u, kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u, kNaN = 0x7fc00000u;
constexpr size_t kBlock = kScaleBlock;  // values at work at a time
constexpr float kFp8Max = 448;
constexpr uint8_t kNoScale = 255;  // the e8m0 byte that is NaN

// Of a row's values, and of what they were. `beyond` and `nan` are 1 where they hold, so that loops can add them up.
struct Encoded {
  uint32_t code, beyond, nan;
};

// The upper bits of a float32 of which `drop` are dropped, rounded half to even.
TIERSTORE_BODY uint32_t rounded(uint32_t magnitude, unsigned drop) {
  return (magnitude + (1u << (drop - 1)) - 1 + (magnitude >> drop & 1)) >> drop;
}

TIERSTORE_BODY Encoded encode_bf16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & kMagnitude;
  const uint32_t nan = magnitude > kInfinity, beyond = magnitude >= 0x7f7f8000u && !nan;
  const uint32_t code = nan ? kNaN >> 16 : beyond ? 0x7f7fu : rounded(magnitude, 16);
  return {code | (bits & kSign) >> 16, beyond, nan};
}

TIERSTORE_BODY Encoded encode_fp16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & kMagnitude;
  const uint32_t nan = magnitude > kInfinity, beyond = magnitude >= bits_of(65520.0f) && !nan;
  // Below 2^-14 results are multiples of 2^-24, the last place of numbers from 0.5 to 1.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t usual = rounded(magnitude, 13) - (112u << 10);
  const uint32_t code = nan ? 0x7e00u : beyond ? 0x7bffu : magnitude < bits_of(0x1p-14f) ? small : usual;
  return {code | (bits & kSign) >> 16, beyond, nan};
}

TIERSTORE_BODY Encoded encode_fp8(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & kMagnitude;
  const uint32_t nan = magnitude > kInfinity, beyond = magnitude > bits_of(464.0f) && !nan;
  // Below 2^-6 results are multiples of 2^-9, the last place of numbers from 2^14 to 2^15.
  const uint32_t small = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
  const uint32_t usual = rounded(magnitude, 20) - (120u << 3);
  const uint32_t code = nan ? 0x7fu : beyond ? 0x7eu : magnitude < bits_of(0x1p-6f) ? small : usual;
  return {code | (bits & kSign) >> 24, beyond, nan};
}

// The exponent field of a float32 has the same bias, but 0 there is not a power of two.
TIERSTORE_BODY float scale_of(uint8_t byte) {
  return float_of(byte == 0 ? 0x00400000u : byte == kNoScale ? kNaN : uint32_t{byte} << 23);
}

// Moved to a float32's place, the bits of a smaller float are its value times a power of two, subnormal or not.
TIERSTORE_BODY float decode_fp8(uint8_t byte, float scale) {
  const uint32_t magnitude = byte & 0x7fu;
  const float value = float_of(bits_of(float_of(magnitude << 20) * 0x1p120f) | uint32_t{byte & 0x80u} << 24) * scale;
  return magnitude == 0x7f || value != value ? float_of(kNaN) : value;
}

TIERSTORE_BODY float decode_fp16(uint16_t code) {
  const uint32_t magnitude = code & 0x7fffu;
  const uint32_t usual = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const uint32_t found = (magnitude == 0x7c00u ? kInfinity : usual) | uint32_t{code & 0x8000u} << 16;
  return float_of(magnitude > 0x7c00u ? kNaN : found);
}

TIERSTORE_BODY float decode_bf16(uint16_t code) { return float_of(uint32_t{code} << 16); }

// `count` values, at most kBlock, of a row whose values have sizeof(Code) bytes. old: their bytes before, or null.
template <typename Code, typename Encode, typename Decode>
TIERSTORE_BODY void encode_some(const float* values, size_t count, const uint8_t* old, const Encode& encode,
                                const Decode& decode, uint8_t* out, QuantizeCounts& counts) {
  Code codes[kBlock], before[kBlock];
  uint32_t beyond = 0, nans = 0;
  if (old == nullptr) {
    for (size_t i = 0; i < count; ++i) {
      const Encoded encoded = encode(values[i]);
      codes[i] = static_cast<Code>(encoded.code);
      beyond += encoded.beyond;
      nans += encoded.nan;
    }
  } else {
    std::memcpy(before, old, count * sizeof(Code));
    for (size_t i = 0; i < count; ++i) {
      const Encoded encoded = encode(values[i]);
      const bool same = bits_of(decode(before[i])) == bits_of(values[i]);
      codes[i] = same ? before[i] : static_cast<Code>(encoded.code);
      beyond += same ? 0 : encoded.beyond;
      nans += same ? 0 : encoded.nan;
    }
  }
  std::memcpy(out, codes, count * sizeof(Code));
  counts.saturated += beyond;
  counts.not_numbers += nans;
}

template <typename Code, typename Encode, typename Decode>
TIERSTORE_BODY void encode_row(const float* values, size_t dim, const uint8_t* old, const Encode& encode,
                               const Decode& decode, uint8_t* out, QuantizeCounts& counts) {
  constexpr size_t bytes = sizeof(Code);
  size_t done = 0;
  for (; done + kBlock <= dim; done += kBlock) {  // of a length that the compiler knows
    encode_some<Code>(values + done, kBlock, old == nullptr ? nullptr : old + done * bytes, encode, decode,
                      out + done * bytes, counts);
  }
  if (done == dim) return;
  encode_some<Code>(values + done, dim - done, old == nullptr ? nullptr : old + done * bytes, encode, decode,
                    out + done * bytes, counts);
}

// The largest finite magnitude of a block.
TIERSTORE_BODY float largest_of(const float* values) {
  uint32_t largest = 0;
  for (size_t i = 0; i < kBlock; ++i) {
    const uint32_t magnitude = bits_of(values[i]) & kMagnitude;
    largest = std::max(largest, magnitude < kInfinity ? magnitude : 0u);
  }
  return float_of(largest);
}

// The byte of the least power of two, of which 448 times are at least `largest`.
uint8_t least_scale(float largest) {
  int exponent;
  const float fraction = std::frexp(largest, &exponent);  // of 0: 0 and 0
  if (fraction == 0) return 0;
  return static_cast<uint8_t>(std::max(exponent - 9 + 127 + (fraction > 0.875f ? 1 : 0), 0));
}

TIERSTORE_BODY bool is_unchanged(const float* values, const uint8_t* old, float scale) {
  uint32_t different = 0;
  for (size_t i = 0; i < kBlock; ++i) different |= bits_of(decode_fp8(old[i], scale)) ^ bits_of(values[i]);
  return different == 0;
}

// One block; `old_scale` is null if there was no row. Returns its scale byte.
TIERSTORE_BODY uint8_t encode_block(const float* values, const uint8_t* old, const uint8_t* old_scale, uint8_t* out,
                                    QuantizeCounts& counts) {
  if (old_scale != nullptr && is_unchanged(values, old, scale_of(*old_scale))) {
    std::memcpy(out, old, kBlock);
    return *old_scale;
  }
  const float largest = largest_of(values);
  const float old_largest = old_scale == nullptr ? 0 : kFp8Max * scale_of(*old_scale);  // NaN for kNoScale
  const bool fits = largest <= old_largest && largest > old_largest / 4;
  const uint8_t byte = fits ? *old_scale : least_scale(largest);
  const float scale = scale_of(byte), inverse = byte == 254 ? 0x1p-127f : float_of(uint32_t{254u - byte} << 23);
  encode_some<uint8_t>(
      values, kBlock, fits ? old : nullptr, [inverse](float value) { return encode_fp8(value * inverse); },
      [scale](uint8_t code) { return decode_fp8(code, scale); }, out, counts);
  return byte;
}

TIERSTORE_BODY void encode_blocks(const float* values, size_t dim, const uint8_t* old, uint8_t* out,
                                  QuantizeCounts& counts) {
  for (size_t done = 0; done < dim; done += kBlock) {
    const uint8_t* old_scale = old == nullptr ? nullptr : old + dim + done / kBlock;
    const uint8_t* old_values = old == nullptr ? nullptr : old + done;
    out[dim + done / kBlock] = encode_block(values + done, old_values, old_scale, out + done, counts);
  }
}

TIERSTORE_BODY void quantize_row(const RowCodec& codec, size_t dim, const float* values, const uint8_t* old,
                                 uint8_t* out, QuantizeCounts& counts) {
  const float factor = codec.factor;
  switch (codec.kind) {
    case RowCodec::Kind::kFp32:
      std::memcpy(out, values, dim * sizeof(float));
      return;
    case RowCodec::Kind::kFp16:
      return encode_row<uint16_t>(
          values, dim, old, [](float value) { return encode_fp16(value); },
          [](uint16_t code) { return decode_fp16(code); }, out, counts);
    case RowCodec::Kind::kBf16:
      return encode_row<uint16_t>(
          values, dim, old, [](float value) { return encode_bf16(value); },
          [](uint16_t code) { return decode_bf16(code); }, out, counts);
    case RowCodec::Kind::kFp8:
      return encode_row<uint8_t>(
          values, dim, old, [factor](float value) { return encode_fp8(value / factor); },
          [factor](uint8_t code) { return decode_fp8(code, factor); }, out, counts);
    case RowCodec::Kind::kFp8E8m0:
      return encode_blocks(values, dim, old, out, counts);
  }
}

TIERSTORE_BODY void dequantize_row(const RowCodec& codec, size_t dim, const uint8_t* row, float* values) {
  switch (codec.kind) {
    case RowCodec::Kind::kFp32:
      std::memcpy(values, row, dim * sizeof(float));
      return;
    case RowCodec::Kind::kFp16:
    case RowCodec::Kind::kBf16:
      for (size_t i = 0; i < dim; ++i) {
        const auto code = static_cast<uint16_t>(row[2 * i] | row[2 * i + 1] << 8);
        values[i] = codec.kind == RowCodec::Kind::kFp16 ? decode_fp16(code) : decode_bf16(code);
      }
      return;
    case RowCodec::Kind::kFp8:
      for (size_t i = 0; i < dim; ++i) values[i] = decode_fp8(row[i], codec.factor);
      return;
    case RowCodec::Kind::kFp8E8m0:
      for (size_t done = 0; done < dim; done += kBlock) {
        const float scale = scale_of(row[dim + done / kBlock]);
        for (size_t i = 0; i < kBlock; ++i) values[done + i] = decode_fp8(row[done + i], scale);
      }
  }
}

struct Work {
  const RowCodec& codec;
  size_t dim, num_rows;
};

TIERSTORE_BODY QuantizeCounts quantize_body(const Work& work, const float* const* values,
                                            const uint8_t* const* old_rows, uint8_t* out) {
  QuantizeCounts counts;
  const size_t row_bytes = codec_row_bytes(work.codec, work.dim);
  for (size_t row = 0; row < work.num_rows; ++row) {
    const uint8_t* old = old_rows == nullptr ? nullptr : old_rows[row];
    quantize_row(work.codec, work.dim, values[row], old, out + row * row_bytes, counts);
  }
  return counts;
}

TIERSTORE_BODY void dequantize_body(const Work& work, const uint8_t* const* rows, float* const* values) {
  for (size_t row = 0; row < work.num_rows; ++row) dequantize_row(work.codec, work.dim, rows[row], values[row]);
}

QuantizeCounts quantize_plain(const Work& work, const float* const* values, const uint8_t* const* old_rows,
                              uint8_t* out) {
  return quantize_body(work, values, old_rows, out);
}
void dequantize_plain(const Work& work, const uint8_t* const* rows, float* const* values) {
  dequantize_body(work, rows, values);
}
#if defined(__x86_64__)
TIERSTORE_AVX2 QuantizeCounts quantize_avx2(const Work& work, const float* const* values,
                                            const uint8_t* const* old_rows, uint8_t* out) {
  return quantize_body(work, values, old_rows, out);
}
TIERSTORE_AVX2 void dequantize_avx2(const Work& work, const uint8_t* const* rows, float* const* values) {
  dequantize_body(work, rows, values);
}
#else
constexpr auto quantize_avx2 = quantize_plain;
constexpr auto dequantize_avx2 = dequantize_plain;
#endif

}  // namespace

size_t codec_row_bytes(const RowCodec& codec, size_t dim) {
  switch (codec.kind) {
    case RowCodec::Kind::kFp32:
      return dim * 4;
    case RowCodec::Kind::kFp16:
    case RowCodec::Kind::kBf16:
      return dim * 2;
    case RowCodec::Kind::kFp8:
      return dim;
    default:
      return dim % kScaleBlock == 0 ? dim + dim / kScaleBlock : 0;
  }
}

QuantizeCounts quantize_rows(const RowCodec& codec, size_t dim, size_t num_rows, const float* const* values,
                             const uint8_t* const* old_rows, uint8_t* out, bool plain) {
  const FloatRules rules;
  const Work work{codec, dim, num_rows};
  return (plain || !has_avx2_fma() ? quantize_plain : quantize_avx2)(work, values, old_rows, out);
}

void dequantize_rows(const RowCodec& codec, size_t dim, size_t num_rows, const uint8_t* const* rows,
                     float* const* values, bool plain) {
  const FloatRules rules;
  (plain || !has_avx2_fma() ? dequantize_plain : dequantize_avx2)({codec, dim, num_rows}, rows, values);
}

}  // namespace tierstore
