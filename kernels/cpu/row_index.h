// Which slot of a row cache holds a row: open addressing over an array that the caller gives.
//
// A place holds 32 bits of the row's hash and the slot plus one; 0: free. Rows that collide lie in the next places.
// When one is erased, those behind it move up, so that nothing marks where a row has been.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mix.h"

namespace tierstore {

// A row and its record's state. Slots of a cache lie in an array, beside the records.
struct RowSlot {
  int64_t row_id;
  uint32_t stamp;  // dirty: its place in the touch log; being written: which write
  uint8_t state;   // RowState
  uint8_t uses;    // since the clock's hand came by, 3 at most
  uint16_t pins;
};
static_assert(sizeof(RowSlot) == 16);

class RowIndex {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  // Places for so many slots: two thirds full at most.
  static size_t num_places_for(size_t num_slots) { return num_slots + num_slots / 2 + 8; }

  // places: [num_places], zero. slots: of the cache, whose row ids are compared.
  RowIndex(uint64_t* places, size_t num_places, const RowSlot* slots)
      : places_(places), num_places_(num_places), slots_(slots) {}

  void prefetch(int64_t row_id) const { __builtin_prefetch(places_ + home(hash_of(row_id))); }

  // Returns the slot that a place names first for this row, without a look at the slot: to prefetch it.
  uint32_t guess(int64_t row_id) const {
    const uint64_t place = places_[home(hash_of(row_id))];
    return place == 0 ? kNone : slot_of(place);
  }

  uint32_t find(int64_t row_id) const {
    const uint64_t hash = hash_of(row_id);
    for (size_t at = home(hash);; at = next(at)) {
      const uint64_t place = places_[at];
      if (place == 0) return kNone;
      if (is_like(place, hash) && slots_[slot_of(place)].row_id == row_id) return slot_of(place);
    }
  }

  // The row is not there.
  void insert(int64_t row_id, uint32_t slot) {
    const uint64_t hash = hash_of(row_id);
    size_t at = home(hash);
    while (places_[at] != 0) at = next(at);
    places_[at] = hash << 32 | (uint64_t{slot} + 1);
  }

  // The row is there, in this slot.
  void erase(int64_t row_id, uint32_t slot) {
    size_t hole = at_of(row_id, slot);
    for (size_t at = next(hole); places_[at] != 0; at = next(at)) {
      const size_t wanted = home(hash_of(slots_[slot_of(places_[at])].row_id));
      // It may move up if its own place is not between the hole and where it lies, going round.
      if ((at - wanted + num_places_) % num_places_ >= (at - hole + num_places_) % num_places_) {
        places_[hole] = places_[at];
        hole = at;
      }
    }
    places_[hole] = 0;
  }

  // The row lies in another slot now.
  void move(int64_t row_id, uint32_t slot, uint32_t to) {
    places_[at_of(row_id, slot)] = hash_of(row_id) << 32 | (uint64_t{to} + 1);
  }

 private:
  static uint64_t hash_of(int64_t row_id) { return mix(static_cast<uint64_t>(row_id)); }
  static bool is_like(uint64_t place, uint64_t hash) { return place >> 32 == (hash & UINT32_MAX); }
  static uint32_t slot_of(uint64_t place) { return static_cast<uint32_t>(place) - 1; }
  size_t home(uint64_t hash) const { return reduce(hash, num_places_); }
  size_t next(size_t at) const { return at + 1 == num_places_ ? 0 : at + 1; }
  size_t at_of(int64_t row_id, uint32_t slot) const {
    size_t at = home(hash_of(row_id));
    while (static_cast<uint32_t>(places_[at]) != slot + 1) at = next(at);
    return at;
  }

  uint64_t* const places_;
  const size_t num_places_;
  const RowSlot* const slots_;
};

}  // namespace tierstore
