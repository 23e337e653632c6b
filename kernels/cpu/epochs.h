// Epochs: which static set a lookup sees, and how it learns that what it copied was no longer that.
//
// A daemon publishes epochs of versions in a control block that clients map read-only. A lookup takes the newest epoch,
// copies, and then checks that the epoch is not reclaimed; if it is, nothing that it copied from memory counts, and it
// reads from disk (a sequence lock over all that an epoch names). So no reader gets what was written over, and none
// delays the writer for long: the writer waits for a grace period, until nobody is counted in the old epoch or its
// patience ends, and then reclaims it. A device's kernels cannot look again when they have copied: whoever launches
// them pins an epoch for them, and the writer waits for that (`pin`).
//
//   line of a version (its number % 2), 64 bytes:  u64 version << 48 | epoch (0: none) | u64 oldest epoch that may be
//   read
//
// In a store of its own process there is one epoch, 0 of version 0, for ever.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace tierstore {

constexpr size_t kLineStride = 64;      // each counter has a cache line for itself
constexpr size_t kControlBytes = 4096;  // a line for each of two versions
constexpr unsigned kVersionShift = 48;

struct alignas(kLineStride) EpochLine {
  std::atomic<uint64_t> current{0};
  std::atomic<uint64_t> oldest{0};

  static EpochLine* at(uint8_t* control, size_t line) { return reinterpret_cast<EpochLine*>(control) + line; }

  void publish(uint64_t version, uint64_t epoch) { current.store(version << kVersionShift | epoch); }
  // What only epochs before `epoch` name may be written over once this has returned.
  void reclaim_before(uint64_t epoch) {
    oldest.store(epoch);
    std::atomic_thread_fence(std::memory_order_seq_cst);
  }
  // The same for all that any epoch of the version names.
  void reclaim_all() {
    current.store(0);
    std::atomic_thread_fence(std::memory_order_seq_cst);
  }
};

// What one lookup sees. Not alive: nothing in memory may be read, since the version is not served any more.
struct EpochView {
  uint64_t epoch = 0;
  bool alive = false;
};

class EpochGate {
 public:
  EpochGate() : line_(&own_line_), active_{&own_active_[0].value, &own_active_[1].value} {}
  // active: two counters in the client's block, by parity of the epoch.
  EpochGate(const EpochLine* line, uint64_t version, std::atomic<uint64_t>* even, std::atomic<uint64_t>* odd)
      : line_(line), version_(version), active_{even, odd} {}
  EpochGate(const EpochGate&) = delete;
  EpochGate& operator=(const EpochGate&) = delete;

  EpochView enter() {
    const uint64_t current = line_->current.load();
    const EpochView view{current & ((uint64_t{1} << kVersionShift) - 1), current >> kVersionShift == version_};
    active_[view.epoch & 1]->fetch_add(1);
    return view;
  }
  void leave(const EpochView& view) { active_[view.epoch & 1]->fetch_sub(1); }

  // As `enter`, and what it returns is the newest epoch after it was counted as well as before: a writer that checks
  // from then on who is in it finds this one. If the version is not served any more, it is not alive, and not counted.
  EpochView pin() {
    for (;;) {
      const EpochView view = enter();
      if (view.alive && newest() == view.epoch) return view;
      leave(view);
      if (!view.alive) return view;
    }
  }

  // The version's newest epoch; nothing where it is not served any more.
  std::optional<uint64_t> newest() const {
    const uint64_t current = line_->current.load();
    if (current >> kVersionShift != version_) return std::nullopt;
    return current & ((uint64_t{1} << kVersionShift) - 1);
  }

  // Whether what was copied since `enter` is what the epoch names.
  bool holds(const EpochView& view) const {
    std::atomic_thread_fence(std::memory_order_acquire);
    return line_->current.load(std::memory_order_relaxed) >> kVersionShift == version_ &&
           line_->oldest.load(std::memory_order_relaxed) <= view.epoch;
  }

  bool is_empty() const { return active_[0]->load() == 0 && active_[1]->load() == 0; }
  bool is_shared() const { return line_ != &own_line_; }

  // In a forked child: the counts are the parent's, or of threads that are not here.
  void forget() {
    own_active_[0].value = own_active_[1].value = 0;
    active_[0] = &own_active_[0].value;
    active_[1] = &own_active_[1].value;
  }

 private:
  struct alignas(kLineStride) Count {
    std::atomic<uint64_t> value{0};
  };
  EpochLine own_line_;
  Count own_active_[2];
  const EpochLine* line_;
  uint64_t version_ = 0;
  std::atomic<uint64_t>* active_[2];
};

}  // namespace tierstore
