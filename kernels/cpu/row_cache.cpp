#include "row_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "racing_copy.h"
#include "shared_rows.h"

namespace tierstore {
namespace {

constexpr size_t kStreamedBytes = 1 << 20;  // of one gather; more goes past the caches
constexpr size_t kAhead = 16;               // rows whose memory is asked for before they are used
constexpr size_t kPartRows = 512;           // that one thread copies at a time
constexpr size_t kBatchRows = 16384;        // references under one hold of the mutex
constexpr size_t kReplayedRows = 16;        // that one thread replays missed steps of at a time
constexpr uint8_t kUsesMax = 3;

size_t round_up(size_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }

void prefetch_record(const uint8_t* record, size_t bytes) {
  for (size_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(record + at);
}

}  // namespace

RowCacheLayout::RowCacheLayout(const RowCacheShape& shape) {
  slots = round_up(shape.num_slots * shape.record_bytes);
  log = slots + round_up(shape.num_slots * sizeof(RowSlot));
  aside = log + round_up(TouchLog::capacity_for(shape.num_slots) * sizeof(uint32_t));
  aside_rows = aside + round_up(shape.num_aside * shape.record_bytes);
  index = aside_rows + round_up(shape.num_aside * sizeof(int64_t));
  num_bytes = index + (shape.is_direct() ? 0 : round_up(RowIndex::num_places_for(shape.num_slots) * sizeof(uint64_t)));
}

RowCache::RowCache(uint8_t* block, const RowCacheShape& shape, const Optimizer& optimizer)
    : shape_(shape),
      optimizer_(optimizer),
      block_(block),
      slots_(reinterpret_cast<RowSlot*>(block + RowCacheLayout(shape).slots)),
      aside_(block + RowCacheLayout(shape).aside),
      aside_rows_(reinterpret_cast<int64_t*>(block + RowCacheLayout(shape).aside_rows)),
      index_(reinterpret_cast<uint64_t*>(block + RowCacheLayout(shape).index),
             RowIndex::num_places_for(shape.num_slots), slots_),
      log_(reinterpret_cast<uint32_t*>(block + RowCacheLayout(shape).log), TouchLog::capacity_for(shape.num_slots)),
      limit_(shape.num_slots),
      num_free_(shape.num_slots),
      history_(optimizer) {}

// Slots of n rows, RowIndex::kNone for kNoRow and for rows that are not here.
void RowCache::resolve(const int64_t* row_ids, size_t n, uint32_t* slots) const {
  if (shape_.is_direct()) {
    for (size_t i = 0; i < n; ++i) {
      if (i + kAhead < n && row_ids[i + kAhead] >= 0) __builtin_prefetch(slots_ + row_ids[i + kAhead]);
      slots[i] = row_ids[i] < 0 ? RowIndex::kNone : find_slot(row_ids[i]);
    }
    return;
  }
  for (size_t i = 0; i < std::min(n, 2 * kAhead); ++i) index_.prefetch(row_ids[i]);
  for (size_t i = 0; i < n; ++i) {
    if (i + 2 * kAhead < n) index_.prefetch(row_ids[i + 2 * kAhead]);
    if (i + kAhead < n) {
      const uint32_t guess = index_.guess(row_ids[i + kAhead]);
      if (guess != RowIndex::kNone) __builtin_prefetch(slots_ + guess);
    }
    slots[i] = row_ids[i] < 0 ? RowIndex::kNone : index_.find(row_ids[i]);
  }
}

void RowCache::gather(const int64_t* row_ids, size_t n, float* out, std::vector<uint32_t>& missing,
                      size_t num_threads) {
  for (size_t first = 0; first < n; first += kBatchRows) {
    const size_t count = std::min(kBatchRows, n - first);
    const std::lock_guard<std::mutex> lock(mutex_);
    resolved_.resize(std::max(resolved_.size(), count));
    resolve(row_ids + first, count, resolved_.data());
    behind_.clear();
    for (size_t i = 0; i < count; ++i) {
      const uint32_t slot = resolved_[i];
      if (slot != RowIndex::kNone) {
        RowSlot& found = slots_[slot];
        found.uses = static_cast<uint8_t>(std::min<int>(found.uses + 1, kUsesMax));
        ++hits_;
        if (optimizer_.rule == Rule::kDenseAdam && !is_frozen(found)) behind_.push_back(slot);
      } else if (row_ids[first + i] >= 0) {
        missing.push_back(static_cast<uint32_t>(first + i));
        ++misses_;
      }
    }
    replay_missed_steps(num_threads);
    float* to = out + first * shape_.dim;
    const bool streamed = n * shape_.dim * sizeof(float) > kStreamedBytes;
    share_rows(count, kPartRows, num_threads,
               [&](size_t start, size_t end) { copy_values(row_ids + first, start, end, to, streamed); });
  }
}

// kDenseAdam: replays the steps that the slots in `behind_` have missed. What a run has of a clean one is older then,
// and replays to the same. Frozen ones stay as their commit wants them.
void RowCache::replay_missed_steps(size_t num_threads) {
  if (behind_.empty()) return;
  std::sort(behind_.begin(), behind_.end());
  behind_.erase(std::unique(behind_.begin(), behind_.end()), behind_.end());
  records_.clear();
  for (const uint32_t slot : behind_) {
    if (is_behind(optimizer_, history_.last(), shape_.dim, floats(slot))) records_.push_back(floats(slot));
  }
  share_rows(records_.size(), kReplayedRows, num_threads, [&](size_t start, size_t end) {
    catch_up_rows(optimizer_, history_.steps(), shape_.dim, end - start, records_.data() + start);
  });
}

void RowCache::bring_up_to_date(uint8_t* records, size_t n, size_t num_threads) const {
  if (optimizer_.rule != Rule::kDenseAdam) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  share_rows(n, kReplayedRows, num_threads, [&](size_t start, size_t end) {
    for (size_t i = start; i < end; ++i) {
      float* each[] = {reinterpret_cast<float*>(records + i * shape_.record_bytes)};
      catch_up_rows(optimizer_, history_.steps(), shape_.dim, 1, each);
    }
  });
}

// Copies the values of references start to end, whose slots are resolved; many go past the caches, since they would
// only push out what is copied next.
void RowCache::copy_values(const int64_t* row_ids, size_t start, size_t end, float* out, bool past_caches) const {
  const size_t value_bytes = shape_.dim * sizeof(float);
  const bool replays = optimizer_.rule == Rule::kDenseAdam;
  const bool streamed = past_caches && (reinterpret_cast<uintptr_t>(out) | value_bytes) % kStreamAlignment == 0;
  for (size_t i = start; i < end; ++i) {
    const size_t ahead = i + kAhead / 4;
    const bool has_next = ahead < end && resolved_[ahead] != RowIndex::kNone;
    float* to = out + i * shape_.dim;
    if (resolved_[i] == RowIndex::kNone) {
      if (has_next) fetch(record(resolved_[ahead]), value_bytes);
      if (row_ids[i] < 0) std::memset(to, 0, value_bytes);
      continue;
    }
    float* from = floats(resolved_[i]);
    if (replays && is_behind(optimizer_, history_.last(), shape_.dim, from)) {  // it is frozen
      std::vector<float> copy(from, from + shape_.record_bytes / sizeof(float));
      float* records[] = {copy.data()};
      catch_up_rows(optimizer_, history_.steps(), shape_.dim, 1, records);
      std::memcpy(to, copy.data(), value_bytes);
    } else {
      racing_copy(reinterpret_cast<uint8_t*>(to), record(resolved_[i]), value_bytes,
                  has_next ? record(resolved_[ahead]) : nullptr, streamed);
    }
  }
  if (streamed) end_streamed_copies();
}

RowPins::RowPins(RowCache& cache) : cache_(cache) {
  const std::lock_guard<std::mutex> lock(cache.mutex_);
  generation_ = cache.generation_;
}

void RowPins::release() {
  cache_.unpin(*this);
  row_ids_.clear();
}

void RowCache::find(const int64_t* row_ids, size_t n, std::vector<uint32_t>& missing, RowPins* pins) {
  const std::lock_guard<std::mutex> lock(mutex_);
  missing.reserve(n);
  resolved_.resize(std::max(resolved_.size(), n));
  if (pins != nullptr) pins->row_ids_.reserve(pins->row_ids_.size() + n);
  resolve(row_ids, n, resolved_.data());
  for (size_t i = 0; i < n; ++i) {
    if (resolved_[i] == RowIndex::kNone) {
      if (row_ids[i] >= 0) missing.push_back(static_cast<uint32_t>(i));
    } else if (pins != nullptr) {
      pin_slot(slots_[resolved_[i]], *pins);
    }
  }
}

// The pins have room for one more.
void RowCache::pin_slot(RowSlot& slot, RowPins& pins) {
  if (slot.pins == kPinsMax || pins.generation_ != generation_) return;
  if (is_victim(slot)) --num_free_;
  if (slot.pins++ == 0) ++num_pinned_;
  pins.row_ids_.push_back(slot.row_id);
}

void RowCache::unpin(const RowPins& pins) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (pins.generation_ != generation_) return;
  for (const int64_t row_id : pins.row_ids_) {
    RowSlot& slot = slots_[find_slot(row_id)];
    if (--slot.pins > 0) continue;
    --num_pinned_;
    if (is_victim(slot)) ++num_free_;
  }
}

size_t RowCache::put(const int64_t* row_ids, size_t n, const uint8_t* records, RowPins* pins) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (pins != nullptr) pins->row_ids_.reserve(pins->row_ids_.size() + n);
  for (size_t i = 0; i < n; ++i) {
    uint32_t at = find_slot(row_ids[i]);
    if (at == RowIndex::kNone) {
      at = slot_for(row_ids[i]);
      if (at == RowIndex::kNone) return i;
      std::memcpy(record(at), records + i * shape_.record_bytes, shape_.record_bytes);
      slots_[at] = RowSlot{row_ids[i], 0, kRowClean, 0, 0};
      if (!shape_.is_direct()) index_.insert(row_ids[i], at);
      ++num_rows_;
      ++num_free_;
    }
    if (pins != nullptr) pin_slot(slots_[at], *pins);
  }
  return n;
}

// Returns an empty slot for a row, which does not count as free any more.
uint32_t RowCache::slot_for(int64_t row_id) {
  if (!shape_.is_direct()) return take_victim(limit_);
  --num_free_;
  return static_cast<uint32_t>(row_id);
}

// Returns an empty slot, after its row has left; kNone if none is free. It does not count as free any more.
uint32_t RowCache::take_victim(size_t below) {
  if (num_free_ == 0) return RowIndex::kNone;
  for (size_t passed = 0; passed <= (kUsesMax + 1) * below; ++passed) {
    if (hand_ >= below) hand_ = 0;
    const auto at = static_cast<uint32_t>(hand_++);
    RowSlot& slot = slots_[at];
    if (slot.state == kRowEmpty || is_victim(slot)) {
      if (slot.state == kRowClean && slot.uses > 0) {
        --slot.uses;
        continue;
      }
      if (slot.state == kRowClean) evict(at);
      --num_free_;
      return at;
    }
  }
  return RowIndex::kNone;
}

void RowCache::evict(uint32_t slot) {
  if (!shape_.is_direct()) index_.erase(slots_[slot].row_id, slot);
  slots_[slot] = RowSlot{};
  --num_rows_;
  ++evicted_;
}

size_t RowCache::drain(uint8_t* out, size_t stride, int64_t* row_ids, size_t n, uint32_t write) {
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t count = 0;
  for (; count < n && num_aside_ > 0; ++count) {
    row_ids[count] = aside_rows_[--num_aside_];
    std::memcpy(out + count * stride, aside_ + num_aside_ * shape_.record_bytes, shape_.record_bytes);
  }
  const size_t entries_end = log_.takeable();
  size_t entry = log_.head();
  for (; entry < entries_end && count < n; ++entry) {
    if (entry + kAhead < entries_end) __builtin_prefetch(slots_ + log_.at(entry + kAhead));
    if (entry + kAhead / 4 < entries_end) {
      prefetch_record(record(log_.at(entry + kAhead / 4)), shape_.record_bytes);
    }
    const uint32_t at = log_.at(entry);
    RowSlot& slot = slots_[at];
    if (slot.state != kRowDirty || slot.stamp != entry) continue;
    row_ids[count] = slot.row_id;
    std::memcpy(out + count++ * stride, record(at), shape_.record_bytes);
    slot.state = kRowWriting;
    slot.stamp = write;
    --num_dirty_;
    ++num_writing_;
  }
  log_.take_to(entry);
  return count;
}

void RowCache::written(const int64_t* row_ids, size_t n, uint32_t write) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < n; ++i) {
    const uint32_t at = find_slot(row_ids[i]);
    if (at == RowIndex::kNone || slots_[at].state != kRowWriting || slots_[at].stamp != write) continue;
    slots_[at].state = kRowClean;
    --num_writing_;
    if (slots_[at].pins == 0) ++num_free_;
  }
}

void RowCache::freeze() {
  const std::lock_guard<std::mutex> lock(mutex_);
  log_.freeze();
}

void RowCache::thaw() {
  const std::lock_guard<std::mutex> lock(mutex_);
  log_.thaw();
}

void RowCache::move(uint32_t at, uint32_t to) {
  RowSlot& slot = slots_[at];
  std::memcpy(record(to), record(at), shape_.record_bytes);
  index_.move(slot.row_id, at, to);
  if (slot.state == kRowDirty) log_.move(slot.stamp, to);
  slots_[to] = slot;
  slot = RowSlot{};
}

size_t RowCache::shrink(size_t num_slots) {
  const std::lock_guard<std::mutex> lock(mutex_);
  while (limit_ > num_slots) {
    const auto last = static_cast<uint32_t>(limit_ - 1);
    if (is_victim(slots_[last])) {
      evict(last);
      --num_free_;
    } else if (slots_[last].state == kRowEmpty) {
      --num_free_;
    } else {
      const uint32_t to = take_victim(last);
      if (to == RowIndex::kNone) break;
      move(last, to);
    }
    --limit_;
  }
  constexpr size_t kPage = 4096;
  uint8_t* const from = record(limit_) + (kPage - reinterpret_cast<uintptr_t>(record(limit_)) % kPage) % kPage;
  uint8_t* const until = record(shape_.num_slots);
  if (until > from + kPage) madvise(from, static_cast<size_t>(until - from) / kPage * kPage, MADV_DONTNEED);
  return limit_;
}

void RowCache::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const RowCacheLayout layout(shape_);
  std::memset(block_ + layout.slots, 0, layout.log - layout.slots);
  std::memset(block_ + layout.index, 0, layout.num_bytes - layout.index);
  log_.clear();
  ++generation_;
  hand_ = 0;
  num_free_ = limit_;
  num_rows_ = num_dirty_ = num_writing_ = num_pinned_ = num_aside_ = 0;
}

RowCacheCounters RowCache::counters() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t num_takeable = num_aside_ + log_.takeable() - std::min(log_.head(), log_.takeable());
  return {hits_,        misses_,     evicted_,  put_aside_,   num_rows_, num_dirty_,
          num_writing_, num_pinned_, num_free_, num_takeable, limit_};
}

}  // namespace tierstore
