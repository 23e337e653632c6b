#include "block_leaves.h"

#include <cmath>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tierstore::leaves {
namespace {

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

template <Order order>
void halves_plain(const Blocks& blocks, const float* codes) {
  const size_t num_bytes = blocks.count / 2;
  uint16_t table[16];
  for (size_t b = 0; b < blocks.num_blocks; ++b) {
    products(codes, blocks.scales[b], 0, table);
    look_up<order>(blocks.values + b * blocks.stride, 0, num_bytes, num_bytes, table, blocks.out + b * blocks.count);
  }
}

template <typename Value>
void bytes_plain(const Blocks& blocks) {
  scale_all_bytes<Value>(blocks);
}

constexpr float kCounts[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

void q4_k_plain(const uint8_t* values, const float* scales, const float* minima, uint16_t* out) {
  uint16_t low[16], high[16];
  for (int pair = 0; pair < 4; ++pair, values += 32, out += 64) {
    products(kCounts, scales[2 * pair], minima[2 * pair], low);
    products(kCounts, scales[2 * pair + 1], minima[2 * pair + 1], high);
    for (int i = 0; i < 32; ++i) out[i] = low[values[i] & 15];
    for (int i = 0; i < 32; ++i) out[32 + i] = high[values[i] >> 4];
  }
}

#if defined(__x86_64__)
#define TIERSTORE_AVX2 __attribute__((target("avx2")))
#define TIERSTORE_FMA __attribute__((target("avx2,fma")))

// The 16 products of a block as two tables of bytes, which one instruction looks 16 codes up in.
struct Tables {
  __m128i low, high;
};

TIERSTORE_AVX2 inline __m256i rounded(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}

TIERSTORE_AVX2 inline Tables tables_of(const float* codes, float scale, float minimum) {
  const __m256 factor = _mm256_set1_ps(scale), less = _mm256_set1_ps(minimum);
  const __m256i first = rounded(_mm256_sub_ps(_mm256_mul_ps(_mm256_loadu_ps(codes), factor), less));
  const __m256i last = rounded(_mm256_sub_ps(_mm256_mul_ps(_mm256_loadu_ps(codes + 8), factor), less));
  // Packing keeps the two parts of 128 bits apart; 0xd8 puts their quarters back in order.
  const __m256i all = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, last), 0xd8);
  const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(all, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(all, 8));
  const __m256i ordered = _mm256_permute4x64_epi64(bytes, 0xd8);
  return {_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)};
}

TIERSTORE_AVX2 inline void store_16(const Tables& tables, __m128i codes, uint16_t* out) {
  const __m128i low = _mm_shuffle_epi8(tables.low, codes), high = _mm_shuffle_epi8(tables.high, codes);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(low, high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), _mm_unpackhi_epi8(low, high));
}

TIERSTORE_AVX2 inline __m128i low_halves(__m128i packed) { return _mm_and_si128(packed, _mm_set1_epi8(15)); }

TIERSTORE_AVX2 inline __m128i high_halves(__m128i packed) { return low_halves(_mm_srli_epi16(packed, 4)); }

template <Order order>
TIERSTORE_AVX2 inline void look_up_wide(const uint8_t* bytes, size_t num_bytes, const Tables& tables, uint16_t* out,
                                        size_t* done) {
  size_t i = 0;
  for (; i + 16 <= num_bytes; i += 16) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
    const __m128i low = low_halves(packed), high = high_halves(packed);
    if (order == Order::kHalves) {
      store_16(tables, low, out + i);
      store_16(tables, high, out + num_bytes + i);
    } else {
      const __m128i first = order == Order::kLowFirst ? low : high, second = order == Order::kLowFirst ? high : low;
      store_16(tables, _mm_unpacklo_epi8(first, second), out + 2 * i);
      store_16(tables, _mm_unpackhi_epi8(first, second), out + 2 * i + 16);
    }
  }
  if (order != Order::kHalves && i + 8 <= num_bytes) {  // a block of 16 values
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i));
    const __m128i low = low_halves(packed), high = high_halves(packed);
    store_16(tables, order == Order::kLowFirst ? _mm_unpacklo_epi8(low, high) : _mm_unpacklo_epi8(high, low),
             out + 2 * i);
    i += 8;
  }
  *done = i;
}

template <Order order>
TIERSTORE_AVX2 void halves_avx2(const Blocks& blocks, const float* codes) {
  const size_t num_bytes = blocks.count / 2;
  for (size_t b = 0; b < blocks.num_blocks; ++b) {
    const uint8_t* bytes = blocks.values + b * blocks.stride;
    uint16_t* out = blocks.out + b * blocks.count;
    size_t done;
    look_up_wide<order>(bytes, num_bytes, tables_of(codes, blocks.scales[b], 0), out, &done);
    if (done < num_bytes) {
      uint16_t table[16];
      products(codes, blocks.scales[b], 0, table);
      look_up<order>(bytes, done, num_bytes, num_bytes, table, out);
    }
  }
}

TIERSTORE_AVX2 void fp8_avx2(const Blocks& blocks) { scale_all_bytes<Fp8Value>(blocks); }

// The eight products of integers and a scale, as bfloat16 in the upper halves of 32 bits; what is below is not 0.
TIERSTORE_AVX2 inline __m256i rounded_above(__m256i integers, __m256 scale) {
  const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(integers), scale));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

// 16 integers of one byte times any scale. flipped: of a byte's bits before it is a two's complement number; 0x80 takes
// 128 away.
template <char flipped>
TIERSTORE_AVX2 inline __m256i products_of_any(const uint8_t* bytes, __m256 scale) {
  __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  if (flipped != 0) packed = _mm_xor_si128(packed, _mm_set1_epi8(flipped));
  // Values of even and of odd index apart: each result then lies where it is stored.
  const __m256i wide = _mm256_cvtepi8_epi16(packed);
  const __m256i even = rounded_above(_mm256_srai_epi32(_mm256_slli_epi32(wide, 16), 16), scale);
  const __m256i odd = rounded_above(_mm256_srai_epi32(wide, 16), scale);
  return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}

// Whether `products_of_short` has this scale: a product's last bit is 0 then, and so is that of kByteOffset times it. A
// negative scale makes -0 of 0, which the sum of two products does not.
inline bool is_short(float scale) {
  uint32_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  return (bits & 0xfff) == 0 && scale >= 0x1p-100f && scale <= 0x1p100f;
}

constexpr uint32_t kByteFloat = 0x47000000;       // 32768.0f, whose second byte is 0: a byte there adds its value
constexpr float kByteOffset = 32768.0f + 128.0f;  // of it, and of the sign bit that is flipped
constexpr char kNone = '\x80';                    // of a shuffle: a byte of zeros

// The same for a scale of at most 12 significant bits, with half the instructions. A byte becomes a float by its place
// alone; one multiply-add takes the offset away, exactly. Both halves of 16 products are then rounded together: what is
// cut off is above a half, or is one of an odd number, if it exceeds 0x7fff by the number's last bit. As its own last
// bit is 0, comparing with -2 or -1 does that.
template <char flipped>
TIERSTORE_FMA inline __m256i products_of_short(const uint8_t* bytes, __m256 scale, __m256 offset) {
  const __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m256i even_places = _mm256_setr_epi8(
      kNone, 0, kNone, kNone, kNone, 2, kNone, kNone, kNone, 4, kNone, kNone, kNone, 6, kNone, kNone,  //
      kNone, 8, kNone, kNone, kNone, 10, kNone, kNone, kNone, 12, kNone, kNone, kNone, 14, kNone, kNone);
  const __m256i odd_places = _mm256_setr_epi8(
      kNone, 1, kNone, kNone, kNone, 3, kNone, kNone, kNone, 5, kNone, kNone, kNone, 7, kNone, kNone,  //
      kNone, 9, kNone, kNone, kNone, 11, kNone, kNone, kNone, 13, kNone, kNone, kNone, 15, kNone, kNone);
  const __m256i whole = _mm256_set1_epi32(static_cast<int>(kByteFloat | (flipped == 0 ? 0x8000 : 0)));
  const auto product = [&](__m256i places) TIERSTORE_FMA {
    const __m256i value = _mm256_xor_si256(_mm256_shuffle_epi8(packed, places), whole);
    return _mm256_castps_si256(_mm256_fmsub_ps(_mm256_castsi256_ps(value), scale, offset));
  };
  const __m256i even = product(even_places), odd = product(odd_places);
  const __m256i kept = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
  const __m256i cut = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
  const __m256i up = _mm256_cmpgt_epi16(_mm256_or_si256(kept, _mm256_set1_epi16(-2)),
                                        _mm256_xor_si256(cut, _mm256_set1_epi16(0x7ffe)));
  return _mm256_sub_epi16(kept, up);
}

template <typename Value, char flipped>
TIERSTORE_FMA void integers_avx2(const Blocks& blocks) {
  for (size_t b = 0; b < blocks.num_blocks; ++b) {
    const uint8_t* bytes = blocks.values + b * blocks.stride;
    uint16_t* out = blocks.out + b * blocks.count;
    const float factor = blocks.scales[b];
    const __m256 scale = _mm256_set1_ps(factor), offset = _mm256_set1_ps(factor * kByteOffset);
    const auto store = [out](size_t i, __m256i values)
                           TIERSTORE_FMA { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), values); };
    size_t i = 0;
    if (is_short(factor)) {
      for (; i + 16 <= blocks.count; i += 16) store(i, products_of_short<flipped>(bytes + i, scale, offset));
    } else {
      for (; i + 16 <= blocks.count; i += 16) store(i, products_of_any<flipped>(bytes + i, scale));
    }
    if (i < blocks.count) scale_bytes<Value>(bytes + i, blocks.count - i, factor, out + i);
  }
}

TIERSTORE_AVX2 void q4_k_avx2(const uint8_t* values, const float* scales, const float* minima, uint16_t* out) {
  for (int pair = 0; pair < 4; ++pair, values += 32, out += 64) {
    const Tables low = tables_of(kCounts, scales[2 * pair], minima[2 * pair]);
    const Tables high = tables_of(kCounts, scales[2 * pair + 1], minima[2 * pair + 1]);
    for (int i = 0; i < 32; i += 16) {
      const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i));
      store_16(low, low_halves(packed), out + i);
      store_16(high, high_halves(packed), out + 32 + i);
    }
  }
}

const Leaves kAvx2 = {
    {halves_avx2<Order::kLowFirst>, halves_avx2<Order::kHighFirst>, halves_avx2<Order::kHalves>},
    {fp8_avx2, integers_avx2<Int8Value, 0>, integers_avx2<Uint8Value, '\x80'>},
    q4_k_avx2,
};
#endif

}  // namespace

const std::array<float, 256> kFp8Values = fp8_values();

const Leaves kPlain = {
    {halves_plain<Order::kLowFirst>, halves_plain<Order::kHighFirst>, halves_plain<Order::kHalves>},
    {bytes_plain<Fp8Value>, bytes_plain<Int8Value>, bytes_plain<Uint8Value>},
    q4_k_plain,
};

const Leaves& fastest() {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) return kAvx2;
#endif
  return kPlain;
}

}  // namespace tierstore::leaves
