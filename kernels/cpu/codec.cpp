#include "codec.h"

#include <algorithm>
#include <cstring>

#include "block_leaves.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tierstore {
namespace {

using leaves::bfloat16_bits;
using leaves::kFp8Values;

// The exponent field of a float32 has the same bias, so that all bytes but two only move to its place.
float e8m0_value(uint8_t byte) {
  const uint32_t bits = byte == 0 ? 0x00400000u : byte == 255 ? 0x7fc00000u : static_cast<uint32_t>(byte) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The scale of a row's values from `start` on: of all, or of their block.
inline float scale_of(const uint8_t* row, size_t dim, size_t start, const float* scale) {
  return scale != nullptr ? *scale : e8m0_value(row[dim + start / kScaleBlock]);
}

inline void decode(const uint8_t* values, size_t count, float scale, uint16_t* out) {
  float found[kScaleBlock];  // apart from the rest, which the compiler makes vectors of
  for (size_t i = 0; i < count; ++i) found[i] = kFp8Values[values[i]];
  for (size_t i = 0; i < count; ++i) out[i] = bfloat16_bits(found[i] * scale);
}

void decode_row_plain(const uint8_t* row, size_t dim, const float* scale, uint16_t* out) {
  size_t done = 0;
  for (; done + kScaleBlock <= dim; done += kScaleBlock)  // of a length that the compiler knows
    decode(row + done, kScaleBlock, scale_of(row, dim, done, scale), out + done);
  if (done < dim) decode(row + done, dim - done, scale_of(row, dim, done, scale), out + done);
}

#if defined(__x86_64__)
// The eight bfloat16 values, each in the low half of 32 bits, of fp16 bits times 256 and a scale.
inline __attribute__((target("avx2,f16c"))) __m256i scaled(__m128i halves, __m256 scale) {
  const __m256 value = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256)), scale);
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

// An e4m3 value has the bits of an fp16 one that is 2^-8 of it, subnormal or not, but for the NaN; the instruction that
// widens fp16 is exact for subnormals in every mode of the thread.
inline __attribute__((target("avx2,f16c"))) void decode_16(const uint8_t* values, __m256 scale, uint16_t* out) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  const __m256i magnitude = _mm256_and_si256(moved, _mm256_set1_epi16(0x3f80));
  const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80));
  const __m256i halves = _mm256_or_si256(_mm256_and_si256(moved, _mm256_set1_epi16(-0x4001)),  // sign, magnitude
                                         _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
  const __m256i low = scaled(_mm256_castsi256_si128(halves), scale);
  const __m256i high = scaled(_mm256_extracti128_si256(halves, 1), scale);
  // Packing goes by halves of the register: put the quarters back in order.
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), packed);
}

__attribute__((target("avx2,f16c"))) void decode_row_avx2(const uint8_t* row, size_t dim, const float* scale,
                                                          uint16_t* out) {
  size_t done = 0;
  for (; done + kScaleBlock <= dim; done += kScaleBlock) {
    const __m256 factor = _mm256_set1_ps(scale_of(row, dim, done, scale));
    decode_16(row + done, factor, out + done);
    decode_16(row + done + 16, factor, out + done + 16);
  }
  if (done < dim) decode(row + done, dim - done, scale_of(row, dim, done, scale), out + done);
}
static_assert(kScaleBlock == 32, "two of 16 values");

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
#endif

using DecodeRow = void (*)(const uint8_t* row, size_t dim, const float* scale, uint16_t* out);

DecodeRow fastest() {
#if defined(__x86_64__)
  if (has_avx2()) return decode_row_avx2;
#endif
  return decode_row_plain;
}

}  // namespace

void decode_fp8_rows(const uint8_t* rows, size_t num_rows, size_t row_bytes, size_t dim, const float* scale,
                     uint16_t* out) {
  static const DecodeRow decode_row = fastest();
  for (size_t row = 0; row < num_rows; ++row) decode_row(rows + row * row_bytes, dim, scale, out + row * dim);
}

}  // namespace tierstore
