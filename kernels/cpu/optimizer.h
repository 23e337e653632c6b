// How an optimizer changes a training record: `dim` float32 values of a row, then the optimizer's state as float32s.
//
// The same bits on every processor: nothing is contracted (setup.py says so), a fused multiply-add stands where torch
// has one, sums over a row have 16 partial sums. kernels/reference_training.py does the same in NumPy.
//
//   kSgd            w = fma(g, -lr, w)                                                  torch.optim.SGD, in bits
//   kRowWiseAdagrad m = decay * m + mean(g * g); w = w + -lr * g / (sqrt(m) + eps)      FBGEMM's; one m a row
//   kLazyAdam       torch.optim.SparseAdam: rows without a gradient stay as they are
//   kDenseAdam      torch.optim.Adam of the whole table: a row that comes back first replays the steps it missed
//
// All have torch's operations in torch's order: a division a value where FBGEMM multiplies by the root's inverse,
// because the last place of that is up to four of torch's away. Bits differ where torch.sqrt is not rounded correctly
// (2.13 on CPUs with AVX2: one element in six is one unit in the last place off); ours always is.
//
// All functions are safe to call from several threads for different records, allocate nothing, and do not throw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace tierstore {

enum class Rule : uint8_t { kSgd, kRowWiseAdagrad, kLazyAdam, kDenseAdam };

constexpr uint32_t kStepMax = 0x7fffffff;  // a record holds its last step as an int32

struct Optimizer {
  Rule rule = Rule::kSgd;
  double lr = 0;  // for callers that give a step no rate of its own
  double eps = 0;
  double beta1 = 0, beta2 = 0;    // of the two Adams
  double decay = 1, initial = 0;  // of kRowWiseAdagrad
};

// Floats of state that follow a row's values.
//   kSgd: none. kRowWiseAdagrad: m. kLazyAdam: first moments [dim], second moments [dim].
//   kDenseAdam: those, and the last step that the record has seen, as the bits of an int32.
size_t state_floats(Rule rule, size_t dim);

// Writes the state of a row that no step has touched.
void initial_state(const Optimizer& optimizer, size_t dim, float* state);

// What one step multiplies with: from float64, rounded once.
struct StepFactors {
  float rate;  // -lr; the Adams: minus the step size
  float root;  // kDenseAdam: the square root of 1 - beta2^step; else 1
};

// step: 1 is the first. lr: this step's own. About 50 ns.
StepFactors step_factors(const Optimizer& optimizer, uint32_t step, double lr);

// The steps up to `last`, which is the one that is being made. Stays right while its history grows.
struct Steps {
  uint32_t last;
  StepFactors now;                           // of step `last`
  std::shared_ptr<const StepFactors[]> all;  // [last], of steps 1 to `last`; kDenseAdam alone needs and has it
};

// The steps of a table. One thread at a time; Steps that were taken are read by any thread meanwhile.
class StepHistory {
 public:
  explicit StepHistory(const Optimizer& optimizer) : optimizer_(optimizer) {}

  // Step last() + 1 has this rate. Throws std::bad_alloc, and std::length_error beyond kStepMax.
  void append(double lr);
  // Starts over, as after `last` steps. rates: [last], of all steps; null is allowed for every rule but kDenseAdam.
  void restart(uint32_t last, const double* rates);

  uint32_t last() const { return steps_.last; }
  const Optimizer& optimizer() const { return optimizer_; }
  const Steps& steps() const { return steps_; }
  size_t bytes() const { return capacity_ * sizeof(StepFactors); }

 private:
  void reserve(size_t count);

  Optimizer optimizer_;
  Steps steps_{0, {0, 1}, nullptr};
  std::shared_ptr<StepFactors[]> factors_;  // entries beyond steps_.last are written before they are announced
  size_t capacity_ = 0;
};

// How a gradient reaches its row: g = (sum + 0) * scale. `+ 0` because a sum of torch starts at 0 and is never -0.
// records: [num_rows], where each record begins. sums: [num_rows], where each row's `dim` summed gradients begin;
// finite. kDenseAdam: a record whose last step is below steps.last - 1 is brought there first; then it has seen
// steps.last. plain: without instructions that not every processor has; the same bits.
void update_rows(const Optimizer& optimizer, const Steps& steps, size_t dim, size_t num_rows, float* const* records,
                 const float* const* sums, float scale, bool plain = false);

// kDenseAdam: brings records to what they are after steps.last without a gradient since their last step; a record that
// has never had one only gets the step's number. Other rules: nothing to do. A step of 128 values takes about 0.1 us.
void catch_up_rows(const Optimizer& optimizer, const Steps& steps, size_t dim, size_t num_rows, float* const* records,
                   bool plain = false);

// Whether catch_up_rows would change the values of a record: so that gather can read the others as they are.
bool is_behind(const Optimizer& optimizer, uint32_t last, size_t dim, const float* record);

}  // namespace tierstore
