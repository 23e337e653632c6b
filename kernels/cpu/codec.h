// Rows of fp8 values into bfloat16, as engram_adapter/codecs.py defines it: what a model on the CPU computes with.
//
// Costs about 0.3 ns a value on one thread that has AVX2, else 0.5; torch's own conversion from fp8 takes 5 and more.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tierstore {

constexpr size_t kScaleBlock = 32;  // values that share one e8m0 scale byte

// rows: [num_rows, row_bytes]; the first `dim` bytes of a row are e4m3 values; out: bfloat16 bits [num_rows, dim].
// value = fp8 * scale in float32, rounded once, half to even. With scale null it is 2^(byte - 127) of the row's own
// scale bytes, one for kScaleBlock values, which follow the values; dim is a multiple of kScaleBlock then.
void decode_fp8_rows(const uint8_t* rows, size_t num_rows, size_t row_bytes, size_t dim, const float* scale,
                     uint16_t* out);

}  // namespace tierstore
