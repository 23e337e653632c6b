// Rows of quantized values with scales of their own into bfloat16, as FORMAT.md defines each codec.
//
// Costs 0.1 to 0.3 ns a value on one thread of a processor with AVX2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace tierstore {

// How values are stored; from kQ8_0 on a block holds its scale too, as in a GGUF file.
enum class Values { kFp8, kFp4, kInt8, kUint8b128, kUint4b8, kNf4, kQ8_0, kQ4_0, kIq4Nl, kQ4K };
enum class Scale { kNone, kE8m0, kE4m3, kBf16, kFp16, kFp32 };

struct BlockCodec {
  Values values;
  Scale scale;   // of the scales that follow a row's values; kNone from kQ8_0 on
  size_t block;  // values that share a scale
  float factor;  // of all scales of type e4m3...
  bool divides;  // ...which are divided by it, or multiplied
};

// By the names that a codec's name is made of; none if there is no such type.
std::optional<Values> values_named(std::string_view name);
std::optional<Scale> scale_named(std::string_view name);  // kNone is ""

// Bytes of a row of `dim` values; 0 if the numbers fit neither each other nor the codec.
size_t block_row_bytes(const BlockCodec& codec, size_t dim);

// rows: [num_rows, row_stride], row_stride at least block_row_bytes(codec, dim), which is not 0; out: bfloat16 bits
// [num_rows, dim]. Computed in float32, rounded once, half to even. plain: without what not every processor can do.
void decode_block_rows(const BlockCodec& codec, const uint8_t* rows, size_t num_rows, size_t row_stride, size_t dim,
                       bool plain, uint16_t* out);

}  // namespace tierstore
