// Epochs: which static set a lookup sees, and how whoever changes it knows that the one before is no longer read.
//
// A lookup counts itself into its epoch before it reads and out when it is done; if the epoch changed between reading its number and
// counting, it counts itself out and tries again. Whoever publishes epoch e waits, before it touches what only epoch e - 1 used,
// until the counts of that parity are 0 everywhere (the readers of RCU: McKenney and Slingwine, 1998; two parities, as in its
// sleepable kind). Both sides are sequentially consistent: either the reader sees the new number or the publisher the reader's count.
//
// In a process of its own a store has one epoch for ever. Attached to a daemon, the number lies in the daemon's control block, which
// is mapped read-only, and the counts in the client's own block.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace tierstore {

constexpr size_t kLineStride = 64;           // each number has a cache line for itself
constexpr size_t kControlBytes = 4096;       // a number for each of two versions, at multiples of kLineStride
constexpr size_t kActiveBytes = 2 * kLineStride;  // the counts of both parities, first in a client's block

inline std::atomic<uint64_t>* line_at(uint8_t* block, size_t line) {
  return reinterpret_cast<std::atomic<uint64_t>*>(block + line * kLineStride);
}

class EpochGate {
 public:
  EpochGate() : epoch_(&own_[0].value), active_{&own_[1].value, &own_[2].value} {}
  // control: kControlBytes; block: a client's.
  EpochGate(uint8_t* control, size_t line, uint8_t* block)
      : epoch_(line_at(control, line)), active_{line_at(block, 0), line_at(block, 1)} {}
  EpochGate(const EpochGate&) = delete;
  EpochGate& operator=(const EpochGate&) = delete;

  uint64_t enter() {
    for (;;) {
      const uint64_t epoch = epoch_->load();
      active_[epoch & 1]->fetch_add(1);
      if (epoch_->load() == epoch) return epoch;
      leave(epoch);
    }
  }
  // Returns whether nobody of this parity is left.
  bool leave(uint64_t epoch) { return active_[epoch & 1]->fetch_sub(1) == 1; }
  bool is_empty() const { return active_[0]->load() == 0 && active_[1]->load() == 0; }
  bool is_shared() const { return epoch_ != &own_[0].value; }

  // In a forked child: the counts are the parent's, or of threads that are not here.
  void forget() {
    for (Line& line : own_) line.value = 0;
    epoch_ = &own_[0].value;
    active_[0] = &own_[1].value;
    active_[1] = &own_[2].value;
  }

 private:
  struct alignas(kLineStride) Line {
    std::atomic<uint64_t> value{0};
  };
  Line own_[3];
  const std::atomic<uint64_t>* epoch_;
  std::atomic<uint64_t>* active_[2];
};

}  // namespace tierstore
