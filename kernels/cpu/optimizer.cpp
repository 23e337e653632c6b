#include "optimizer.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "float_rules.h"

namespace tierstore {
namespace {

constexpr size_t kPrefetchRows = 4;  // records that are asked for ahead of the one at work
constexpr size_t kLineBytes = 64;

// base^exponent by squaring: libm's pow may differ between processors.
double power(double base, uint32_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if ((exponent & 1) != 0) result *= base;
  }
  return result;
}

// The optimizer's numbers as its loops need them, rounded once.
struct Numbers {
  explicit Numbers(const Optimizer& optimizer)
      : eps(static_cast<float>(optimizer.eps)),
        decay(static_cast<float>(optimizer.decay)),
        beta2(static_cast<float>(optimizer.beta2)),
        rest1(static_cast<float>(1 - optimizer.beta1)),
        rest2(static_cast<float>(1 - optimizer.beta2)) {}
  float eps, decay, beta2, rest1, rest2;
};

TIERSTORE_BODY float gradient_of(float sum, float scale) { return (sum + 0.0f) * scale; }

TIERSTORE_BODY void sgd(float rate, size_t dim, float* values, const float* sums, float scale) {
  for (size_t i = 0; i < dim; ++i) values[i] = __builtin_fmaf(gradient_of(sums[i], scale), rate, values[i]);
}

TIERSTORE_BODY float mean_square(size_t dim, const float* sums, float scale) {
  float parts[kParts] = {};
  size_t done = 0;
  for (; done + kParts <= dim; done += kParts) {
    for (size_t i = 0; i < kParts; ++i) {
      const float gradient = gradient_of(sums[done + i], scale);
      parts[i] = __builtin_fmaf(gradient, gradient, parts[i]);
    }
  }
  for (size_t i = 0; done + i < dim; ++i) {
    const float gradient = gradient_of(sums[done + i], scale);
    parts[i] = __builtin_fmaf(gradient, gradient, parts[i]);
  }
  return sum_of_parts(parts) / static_cast<float>(dim);
}

TIERSTORE_BODY void row_wise_adagrad(const Numbers& numbers, float rate, size_t dim, float* values, const float* sums,
                                     float scale) {
  float& mean = values[dim];
  mean = numbers.decay * mean + mean_square(dim, sums, scale);
  const float root = __builtin_sqrtf(mean) + numbers.eps;
  for (size_t i = 0; i < dim; ++i) values[i] += rate * gradient_of(sums[i], scale) / root;
}

TIERSTORE_BODY void lazy_adam(const Numbers& numbers, float rate, size_t dim, float* __restrict values,
                              const float* __restrict sums, float scale) {
  float* __restrict first = values + dim;
  float* __restrict second = values + 2 * dim;
  for (size_t i = 0; i < dim; ++i) {
    const float gradient = gradient_of(sums[i], scale);
    first[i] += (gradient - first[i]) * numbers.rest1;
    second[i] += (gradient * gradient - second[i]) * numbers.rest2;
    values[i] += rate * (first[i] / (__builtin_sqrtf(second[i]) + numbers.eps));
  }
}

// One step of a value. torch.lerp starts from the nearer end.
TIERSTORE_BODY void adam_moments(const Numbers& numbers, float gradient, float& first, float& second) {
  const float way = gradient - first;
  first = numbers.rest1 < 0.5f ? __builtin_fmaf(numbers.rest1, way, first)
                               : __builtin_fmaf(numbers.rest1 - 1.0f, way, gradient);
  second = __builtin_fmaf(numbers.rest2 * gradient, gradient, second * numbers.beta2);
}

TIERSTORE_BODY float adam_value(const Numbers& numbers, const StepFactors& step, float value, float first,
                                float second) {
  return value + step.rate * first / (__builtin_sqrtf(second) / step.root + numbers.eps);
}

TIERSTORE_BODY void dense_adam(const Numbers& numbers, const StepFactors& step, size_t dim, float* __restrict values,
                               const float* __restrict sums, float scale) {
  float* __restrict first = values + dim;
  float* __restrict second = values + 2 * dim;
  for (size_t i = 0; i < dim; ++i) {
    adam_moments(numbers, gradient_of(sums[i], scale), first[i], second[i]);
    values[i] = adam_value(numbers, step, values[i], first[i], second[i]);
  }
}

uint32_t last_step(size_t dim, const float* record) { return bits_of(record[3 * dim]); }

void set_last_step(size_t dim, float* record, uint32_t step) { std::memcpy(record + 3 * dim, &step, sizeof step); }

bool has_moments(size_t dim, const float* record) {
  uint32_t any = 0;
  for (size_t i = dim; i < 3 * dim; ++i) any |= bits_of(record[i]);
  return any != 0;
}

constexpr size_t kBlock = 32;         // values that are replayed together: enough to hide how long a square root takes
constexpr uint32_t kCheckSteps = 16;  // steps between two looks whether values still move

// Whether no later step without a gradient can change a value of the block. |first| only shrinks, the denominator is at
// least eps, and what is below a quarter of the value's last place is rounded away; `largest` is the largest rate.
TIERSTORE_BODY bool at_rest(const Numbers& numbers, float largest, size_t count, const float* values,
                            const float* first) {
  bool rest = true;
  for (size_t i = 0; i < count; ++i) {
    const float value = std::fabs(values[i]), most = largest * std::fabs(first[i]) * 1.001f;
    const bool is_small = most < 0x1p-26f * value * numbers.eps && value > 0x1p-60f;
    rest &= is_small || bits_of(first[i]) == 0 || (first[i] == 0.0f && value > 0.0f);  // -0 turns a value of -0 into 0
  }
  return rest;
}

// Steps start + 1 to end without a gradient, of `count` values, at most kBlock.
TIERSTORE_BODY void replay_block(const Numbers& numbers, const StepFactors* steps, uint32_t start, uint32_t end,
                                 float largest, size_t count, float* values, float* first, float* second) {
  uint32_t step = start;
  while (step < end && !at_rest(numbers, largest, count, values, first)) {
    const uint32_t stop = std::min(end, step + kCheckSteps);
    for (; step < stop; ++step) {
      for (size_t i = 0; i < count; ++i) {
        adam_moments(numbers, 0.0f, first[i], second[i]);
        values[i] = adam_value(numbers, steps[step], values[i], first[i], second[i]);
      }
    }
  }
  for (; step < end; ++step) {
    for (size_t i = 0; i < count; ++i) adam_moments(numbers, 0.0f, first[i], second[i]);
  }
}

TIERSTORE_BODY void replay(const Numbers& numbers, const StepFactors* steps, uint32_t start, uint32_t end, size_t dim,
                           float* record) {
  float largest = 0;
  for (uint32_t step = start; step < end; ++step) largest = std::max(largest, std::fabs(steps[step].rate));
  for (size_t done = 0; done < dim; done += kBlock) {
    float block[3][kBlock];  // in registers
    const size_t count = std::min(kBlock, dim - done);
    for (size_t part = 0; part < 3; ++part) {
      std::memcpy(block[part], record + part * dim + done, count * sizeof(float));
    }
    if (count == kBlock) {  // of a length that the compiler knows
      replay_block(numbers, steps, start, end, largest, kBlock, block[0], block[1], block[2]);
    } else {
      replay_block(numbers, steps, start, end, largest, count, block[0], block[1], block[2]);
    }
    for (size_t part = 0; part < 3; ++part) {
      std::memcpy(record + part * dim + done, block[part], count * sizeof(float));
    }
  }
}

TIERSTORE_BODY void catch_up_to(const Numbers& numbers, const Steps& steps, uint32_t end, size_t dim, float* record) {
  const uint32_t start = last_step(dim, record);
  if (start >= end) return;
  if (has_moments(dim, record)) replay(numbers, steps.all.get(), start, end, dim, record);
  set_last_step(dim, record, end);
}

TIERSTORE_BODY void prefetch(const float* at, size_t num_floats, bool to_write) {
  const char* byte = reinterpret_cast<const char*>(at);
  for (size_t i = 0; i < num_floats * sizeof(float); i += kLineBytes) {
    if (to_write) {
      __builtin_prefetch(byte + i, 1);
    } else {
      __builtin_prefetch(byte + i, 0);
    }
  }
}

struct Work {
  const Optimizer& optimizer;
  const Steps& steps;
  size_t dim, num_rows;
  float* const* records;
  const float* const* sums;
  float scale;
};

TIERSTORE_BODY void update_row(const Work& work, const Numbers& numbers, float* record, const float* sums) {
  const size_t dim = work.dim;
  switch (work.optimizer.rule) {
    case Rule::kSgd:
      return sgd(work.steps.now.rate, dim, record, sums, work.scale);
    case Rule::kRowWiseAdagrad:
      return row_wise_adagrad(numbers, work.steps.now.rate, dim, record, sums, work.scale);
    case Rule::kLazyAdam:
      return lazy_adam(numbers, work.steps.now.rate, dim, record, sums, work.scale);
    case Rule::kDenseAdam:
      catch_up_to(numbers, work.steps, work.steps.last - 1, dim, record);
      dense_adam(numbers, work.steps.now, dim, record, sums, work.scale);
      set_last_step(dim, record, work.steps.last);
  }
}

TIERSTORE_BODY void update_body(const Work& work) {
  const Numbers numbers(work.optimizer);
  const size_t record_floats = work.dim + state_floats(work.optimizer.rule, work.dim);
  for (size_t row = 0; row < std::min(kPrefetchRows, work.num_rows); ++row) {
    prefetch(work.records[row], record_floats, true);
    prefetch(work.sums[row], work.dim, false);
  }
  for (size_t row = 0; row < work.num_rows; ++row) {
    if (row + kPrefetchRows < work.num_rows) {
      prefetch(work.records[row + kPrefetchRows], record_floats, true);
      prefetch(work.sums[row + kPrefetchRows], work.dim, false);
    }
    update_row(work, numbers, work.records[row], work.sums[row]);
  }
}

TIERSTORE_BODY void catch_up_body(const Work& work) {
  const Numbers numbers(work.optimizer);
  for (size_t row = 0; row < work.num_rows; ++row) {
    catch_up_to(numbers, work.steps, work.steps.last, work.dim, work.records[row]);
  }
}

void update_plain(const Work& work) { update_body(work); }
void catch_up_plain(const Work& work) { catch_up_body(work); }
#if defined(__x86_64__)
TIERSTORE_AVX2 void update_avx2(const Work& work) { update_body(work); }
TIERSTORE_AVX2 void catch_up_avx2(const Work& work) { catch_up_body(work); }
#else
constexpr auto update_avx2 = update_plain;
constexpr auto catch_up_avx2 = catch_up_plain;
#endif

}  // namespace

size_t state_floats(Rule rule, size_t dim) {
  switch (rule) {
    case Rule::kSgd:
      return 0;
    case Rule::kRowWiseAdagrad:
      return 1;
    case Rule::kLazyAdam:
      return 2 * dim;
    default:
      return 2 * dim + 1;
  }
}

void initial_state(const Optimizer& optimizer, size_t dim, float* state) {
  const float first = optimizer.rule == Rule::kRowWiseAdagrad ? static_cast<float>(optimizer.initial) : 0.0f;
  std::fill_n(state, state_floats(optimizer.rule, dim), first);
}

StepFactors step_factors(const Optimizer& optimizer, uint32_t step, double lr) {
  if (optimizer.rule == Rule::kSgd || optimizer.rule == Rule::kRowWiseAdagrad) return {static_cast<float>(-lr), 1};
  const double first = 1 - power(optimizer.beta1, step), second = std::sqrt(1 - power(optimizer.beta2, step));
  if (optimizer.rule == Rule::kLazyAdam) return {static_cast<float>(-(lr * second / first)), 1};
  return {static_cast<float>(-(lr / first)), static_cast<float>(second)};
}

void StepHistory::reserve(size_t count) {
  if (count <= capacity_) return;
  const size_t capacity = std::max(count, 2 * capacity_);
  std::shared_ptr<StepFactors[]> grown(new StepFactors[capacity]);
  std::copy_n(factors_.get(), steps_.last, grown.get());
  factors_ = std::move(grown);
  capacity_ = capacity;
}

void StepHistory::append(double lr) {
  if (steps_.last >= kStepMax) throw std::length_error("a table has at most 2147483647 steps");
  const StepFactors now = step_factors(optimizer_, steps_.last + 1, lr);
  if (optimizer_.rule == Rule::kDenseAdam) {
    reserve(size_t{steps_.last} + 1);
    factors_[steps_.last] = now;
  }
  steps_ = {steps_.last + 1, now, factors_};
}

void StepHistory::restart(uint32_t last, const double* rates) {
  if (last > kStepMax) throw std::length_error("a table has at most 2147483647 steps");
  StepHistory fresh(optimizer_);
  if (optimizer_.rule == Rule::kDenseAdam) {
    fresh.reserve(last);
    for (uint32_t step = 0; step < last; ++step) fresh.factors_[step] = step_factors(optimizer_, step + 1, rates[step]);
  }
  fresh.steps_ = {last, {0, 1}, fresh.factors_};
  if (last > 0 && rates != nullptr) fresh.steps_.now = step_factors(optimizer_, last, rates[last - 1]);
  *this = std::move(fresh);
}

void update_rows(const Optimizer& optimizer, const Steps& steps, size_t dim, size_t num_rows, float* const* records,
                 const float* const* sums, float scale, bool plain) {
  const FloatRules rules;
  (plain || !has_avx2_fma() ? update_plain : update_avx2)({optimizer, steps, dim, num_rows, records, sums, scale});
}

void catch_up_rows(const Optimizer& optimizer, const Steps& steps, size_t dim, size_t num_rows, float* const* records,
                   bool plain) {
  if (optimizer.rule != Rule::kDenseAdam) return;
  const FloatRules rules;
  (plain || !has_avx2_fma() ? catch_up_plain : catch_up_avx2)({optimizer, steps, dim, num_rows, records, nullptr, 1});
}

bool is_behind(const Optimizer& optimizer, uint32_t last, size_t dim, const float* record) {
  return optimizer.rule == Rule::kDenseAdam && last_step(dim, record) < last && has_moments(dim, record);
}

}  // namespace tierstore
