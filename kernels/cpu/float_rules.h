// What the kernels of training need so that floats have the same bits on every processor and every thread.
//
// A kernel's body is an always-inlined function of plain loops, compiled twice: as every processor of the family can
// run it, and for AVX2 with FMA. Neither may contract or reorder (setup.py), __builtin_fmaf rounds once in both, sums
// have kParts partial sums that are added as a tree: so both give the same bits.
#pragma once

#include <cfenv>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define TIERSTORE_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif
#define TIERSTORE_BODY inline __attribute__((always_inline))

namespace tierstore {

constexpr size_t kParts = 16;

inline bool has_avx2_fma() {
#if defined(__x86_64__)
  static const bool has =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has;
#else
  return false;
#endif
}

// For its lifetime, this thread rounds half to even and keeps subnormals, whatever the caller asked for:
// torch.set_flush_denormal(True) must not change what is trained.
class FloatRules {
 public:
  FloatRules() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatRules() { std::fesetenv(&before_); }
  FloatRules(const FloatRules&) = delete;
  FloatRules& operator=(const FloatRules&) = delete;

 private:
  std::fenv_t before_;
};

TIERSTORE_BODY uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

TIERSTORE_BODY float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// parts[0] + ... + parts[kParts - 1], halves on halves.
TIERSTORE_BODY float sum_of_parts(float* parts) {
  for (size_t width = kParts / 2; width > 0; width /= 2) {
    for (size_t i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}

}  // namespace tierstore
