// Rows of float32 values into the bytes of a table's codec and back, as tierstore/codec.py defines them.
//
// Into: rounded half to even; what would round beyond the codec's largest value becomes that value and is counted. A
// value whose bits are those of the old row's value keeps the old row's bytes, and scales are kept while they fit: rows
// that training did not change come out byte-identical. Back: exact.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tierstore {

struct RowCodec {
  enum class Kind : uint8_t {
    kFp32,
    kFp16,
    kBf16,
    kFp8,      // e4m3 times `factor`, one float32 for the whole table
    kFp8E8m0,  // e4m3 times 2^(byte - 127), a scale byte for each kScaleBlock values, after all values
  };
  Kind kind;
  float factor = 1;  // of kFp8, not 0
};

// Bytes of a row; 0 if dim values are not whole blocks.
size_t codec_row_bytes(const RowCodec& codec, size_t dim);

struct QuantizeCounts {
  size_t saturated = 0;  // values that were beyond the largest, infinities included
  size_t not_numbers = 0;
};

// values: [num_rows], where each row's `dim` values begin. old_rows: [num_rows], where the row's bytes before begin, or
// null for none; old_rows itself may be null. out: [num_rows, row_bytes], contiguous; may not overlap.
// e8m0: a block of which no value changed keeps its bytes. Else its scale byte stays if the largest magnitude is at
// most 448 times the scale and above a quarter of that; else it is the least power of two that fits.
QuantizeCounts quantize_rows(const RowCodec& codec, size_t dim, size_t num_rows, const float* const* values,
                             const uint8_t* const* old_rows, uint8_t* out, bool plain = false);

// rows: [num_rows], where each row's bytes begin. values: [num_rows], where its `dim` values go.
void dequantize_rows(const RowCodec& codec, size_t dim, size_t num_rows, const uint8_t* const* rows,
                     float* const* values, bool plain = false);

}  // namespace tierstore
