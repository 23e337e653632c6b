// In which order the dirty rows of a cache were touched last: a log of slots.
//
// Each touch appends its slot, and the slot keeps the number of that entry as its stamp. An entry is live if its slot
// is dirty and has that stamp: so the last touch counts, and no list has to be mended when a row is touched again. A
// freeze for a commit is one number, the cut: dirty rows with a stamp below it belong to the commit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tierstore {

class TouchLog {
 public:
  // Entries for so many slots, of which each may be touched once before the log is packed.
  static size_t capacity_for(size_t num_slots) { return 2 * num_slots + 64; }

  TouchLog(uint32_t* slots, size_t capacity) : slots_(slots), capacity_(capacity) {}

  size_t room() const { return capacity_ - end_; }
  uint32_t append(uint32_t slot) {
    slots_[end_] = slot;
    return static_cast<uint32_t>(end_++);
  }

  // Entries that may be taken now: [head, takeable), all of them, or those below the cut if there is one.
  size_t head() const { return head_; }
  size_t takeable() const { return is_cut_ ? cut_ : end_; }
  // Stamps below it were frozen.
  size_t cut() const { return cut_; }
  uint32_t at(size_t entry) const { return slots_[entry]; }
  void take_to(size_t entry) { head_ = entry; }
  void freeze() {
    cut_ = end_;
    is_cut_ = true;
  }
  void thaw() {
    cut_ = 0;
    is_cut_ = false;
  }
  void clear() {
    head_ = end_ = 0;
    thaw();
  }
  // The slot of an entry is another one.
  void move(uint32_t stamp, uint32_t slot) { slots_[stamp] = slot; }

  // Drops entries that are not live, so that live ones are numbered from 0 on. is_live(slot, stamp); restamp(slot,
  // stamp). Costs a look at each slot of the log; there is one touch for each since the last time.
  template <typename IsLive, typename Restamp>
  void pack(const IsLive& is_live, const Restamp& restamp) {
    size_t to = 0, cut = 0;
    for (size_t entry = head_; entry < end_; ++entry) {
      const uint32_t slot = slots_[entry];
      if (!is_live(slot, static_cast<uint32_t>(entry))) continue;
      slots_[to] = slot;
      restamp(slot, static_cast<uint32_t>(to));
      ++to;
      if (entry < cut_) cut = to;
    }
    head_ = 0;
    end_ = to;
    cut_ = cut;
  }

 private:
  uint32_t* const slots_;
  const size_t capacity_;
  size_t head_ = 0, end_ = 0, cut_ = 0;
  bool is_cut_ = false;
};

}  // namespace tierstore
