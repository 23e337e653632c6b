// Training records of one table in DRAM, by row id, with write-back.
//
// Slots of one block hold records; an index says which slot holds a row (a table that fits whole needs none: row i lies
// in slot i). A record is clean (a run or the base store has it), dirty (only here), or being written: a copy of it is
// on its way to a run, and until that is there, the slot keeps it.
//
// clean -- update --> dirty -- drain --> being written -- written --> clean
//                       ^------- update -------'
//
// *Victims*: a clock's hand passes over clean, unpinned slots; each use since it last came by (at most 3) spares one
// once. A new row has none, so rows seen once go first. No window or history, as the entry cache has them: each row
// that is read is also written, so a victim costs a read, never a wrong answer, and admission could not refuse it.
// *Commits*: `freeze` cuts the touch log. An update that meets a dirty record from before the cut first puts a copy
// aside, and `drain` takes those as well.
//
// One mutex guards index, states, log and records; nothing waits for a disk while it holds it. Any thread may call. One
// thread at a time updates, and one drains.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "gradient_sums.h"
#include "optimizer.h"
#include "row_index.h"
#include "touch_log.h"

namespace tierstore {

enum RowState : uint8_t { kRowEmpty, kRowClean, kRowDirty, kRowWriting };

struct RowCacheShape {
  int64_t num_rows;     // of the table
  size_t dim;           // values of a record, which come first in it
  size_t record_bytes;  // a multiple of 16
  size_t num_slots;     // at least num_rows: every row has its own slot
  size_t num_aside;     // records that may lie aside

  bool is_direct() const { return num_slots >= static_cast<size_t>(num_rows); }
};

// Where the parts of the block begin.
struct RowCacheLayout {
  size_t slots, log, aside, aside_rows, index, num_bytes;
  explicit RowCacheLayout(const RowCacheShape& shape);
};

struct RowCacheCounters {
  uint64_t hits, misses;                                            // references
  uint64_t evicted, put_aside;                                      // records
  uint64_t num_rows, num_dirty, num_writing, num_pinned, num_free;  // now
  uint64_t num_takeable;                                            // records that `drain` has left, at most
  uint64_t num_slots;
};

struct UpdateOutcome {
  enum What : uint8_t { kDone, kMissing, kNoRoomAside, kNotFinite } what;
  size_t count;  // rows missing; records that must be put aside; the first distinct row whose sum is not finite
};

class RowCache;

// Rows that somebody keeps in a cache, each as often as it was given. One thread at a time uses it; the cache outlives
// it. What a cleared cache had pinned is not pinned any more.
class RowPins {
 public:
  explicit RowPins(RowCache& cache);
  ~RowPins() { release(); }
  RowPins(const RowPins&) = delete;
  RowPins& operator=(const RowPins&) = delete;

  void release();
  size_t count() const { return row_ids_.size(); }

 private:
  friend class RowCache;
  RowCache& cache_;
  uint64_t generation_ = 0;
  std::vector<int64_t> row_ids_;
};

class RowCache {
 public:
  static constexpr size_t kSlotsMax = UINT32_MAX / 4;
  static constexpr uint16_t kPinsMax = UINT16_MAX;

  // block: RowCacheLayout::num_bytes, zero, aligned to 64; outlives this.
  RowCache(uint8_t* block, const RowCacheShape& shape, const Optimizer& optimizer);

  const RowCacheShape& shape() const { return shape_; }

  // Copies the values of rows, kNoRow: zeros, into out [n, dim]. Appends the references whose row is not here to
  // `missing`. kDenseAdam: records are brought up to date first. Row ids were checked.
  void gather(const int64_t* row_ids, size_t n, float* out, std::vector<uint32_t>& missing, size_t num_threads);

  // Does the same with records that are not in a slot, [n, record_bytes]: brings them up to date, nothing more.
  void bring_up_to_date(uint8_t* records, size_t n, size_t num_threads) const;

  // Appends the indexes of rows that are not here to `missing`; kNoRow is not. pins: takes those that are; may be null.
  void find(const int64_t* row_ids, size_t n, std::vector<uint32_t>& missing, RowPins* pins);

  // Takes over records [n, record_bytes] of different rows, in order, until no slot is free; returns how many. Rows
  // that are here already stay as they are. pins: takes them all; may be null.
  size_t put(const int64_t* row_ids, size_t n, const uint8_t* records, RowPins* pins);

  // One step, with the rate lr, on distinct rows start to end; with the last of them it is complete, and `num_steps`
  // has one more. If a row is missing, a sum is not finite, or there is no room aside, nothing is changed, and
  // `missing` has the numbers of the distinct rows that are not here. A step in parts needs sums that are known to be
  // finite: only one of all rows is checked here.
  UpdateOutcome update(const DistinctRows& rows, size_t start, size_t end, const Gradients& gradients, double lr,
                       std::vector<float>& scratch, size_t num_threads, std::vector<uint32_t>& missing);

  uint32_t num_steps() const;
  // rates: [num_steps], of all steps so far; needed for kDenseAdam alone.
  void set_steps(uint32_t num_steps, const double* rates);
  // Of all steps so far; empty but for kDenseAdam.
  std::vector<double> rates() const;

  // Copies up to n dirty records, put aside or touched longest ago first, into out, `stride` bytes apart, and their
  // rows. Only frozen ones, if any were frozen and not thawed. write: their number, for `written`.
  size_t drain(uint8_t* out, size_t stride, int64_t* row_ids, size_t n, uint32_t write);

  // A write is done: its rows are clean, unless they were touched meanwhile.
  void written(const int64_t* row_ids, size_t n, uint32_t write);

  void freeze();
  void thaw();

  // Gives up slots from num_slots on, rows in them move; returns how many slots there are then: more than asked for, if
  // dirty or pinned rows were in the way. Not of a direct cache.
  size_t shrink(size_t num_slots);

  // Forgets all rows. Nobody else uses the cache.
  void clear();

  RowCacheCounters counters() const;

 private:
  uint8_t* record(size_t slot) const { return block_ + slot * shape_.record_bytes; }
  float* floats(size_t slot) const { return reinterpret_cast<float*>(record(slot)); }
  uint32_t find_slot(int64_t row_id) const {
    if (!shape_.is_direct()) return index_.find(row_id);
    return slots_[row_id].state == kRowEmpty ? RowIndex::kNone : static_cast<uint32_t>(row_id);
  }
  void resolve(const int64_t* row_ids, size_t n, uint32_t* slots) const;
  void replay_missed_steps(size_t num_threads);
  size_t apply(const DistinctRows& rows, size_t start, size_t end, const Gradients& gradients, const Steps& steps,
               std::vector<float>& scratch, size_t num_threads);
  bool is_frozen(const RowSlot& slot) const { return slot.state == kRowDirty && slot.stamp < log_.cut(); }
  bool is_victim(const RowSlot& slot) const { return slot.state == kRowClean && slot.pins == 0; }
  uint32_t slot_for(int64_t row_id);
  uint32_t take_victim(size_t below);
  void evict(uint32_t slot);
  void move(uint32_t slot, uint32_t to);
  friend class RowPins;
  void unpin(const RowPins& pins);
  void pin_slot(RowSlot& slot, RowPins& pins);
  void touch(uint32_t slot);
  void make_room_in_log(size_t n);
  void put_aside(size_t n);
  void copy_values(const int64_t* row_ids, size_t start, size_t end, float* out, bool past_caches) const;

  const RowCacheShape shape_;
  const Optimizer optimizer_;
  uint8_t* const block_;
  RowSlot* const slots_;
  uint8_t* const aside_;
  int64_t* const aside_rows_;

  mutable std::mutex mutex_;  // guards everything below, and the block
  RowIndex index_;
  TouchLog log_;
  size_t limit_;     // slots in use, below the block's after `shrink`
  size_t hand_ = 0;  // the clock's
  size_t num_free_;  // slots that are empty, or clean and not pinned
  size_t num_rows_ = 0, num_dirty_ = 0, num_writing_ = 0, num_pinned_ = 0, num_aside_ = 0;
  uint64_t generation_ = 0;  // how often it was cleared
  uint64_t hits_ = 0, misses_ = 0, evicted_ = 0, put_aside_ = 0;
  StepHistory history_;
  std::vector<double> rates_;       // of all steps, of kDenseAdam
  std::vector<uint32_t> resolved_;  // slots of the call's rows
  std::vector<uint32_t> behind_;
  std::vector<float*> records_;
};

}  // namespace tierstore
