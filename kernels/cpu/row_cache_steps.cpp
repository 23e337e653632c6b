// Steps on the records of a row cache: what an update changes, what it puts aside for a commit, and the touch log.
#include <algorithm>
#include <cstring>

#include "row_cache.h"

namespace tierstore {
namespace {

constexpr size_t kPartRows = 512;   // whose sums are in scratch at a time, in a step in parts
constexpr size_t kAheadSlots = 16;  // slots that are asked for before they are used: records came in between

}  // namespace

void RowCache::make_room_in_log(size_t n) {
  if (log_.room() >= n) return;
  log_.pack(
      [this](uint32_t slot, uint32_t stamp) { return slots_[slot].state == kRowDirty && slots_[slot].stamp == stamp; },
      [this](uint32_t slot, uint32_t stamp) { slots_[slot].stamp = stamp; });
}

void RowCache::touch(uint32_t at) {
  RowSlot& slot = slots_[at];
  if (is_victim(slot)) --num_free_;
  if (slot.state == kRowWriting) --num_writing_;
  if (slot.state != kRowDirty) ++num_dirty_;
  slot.state = kRowDirty;
  slot.stamp = log_.append(at);
}

UpdateOutcome RowCache::update(const DistinctRows& rows, size_t start, size_t end, const Gradients& gradients,
                               double lr, std::vector<float>& scratch, size_t num_threads,
                               std::vector<uint32_t>& missing) {
  const size_t n = end - start;
  const std::lock_guard<std::mutex> lock(mutex_);
  resolved_.resize(std::max(resolved_.size(), n));
  records_.resize(std::max(records_.size(), n));
  resolve(rows.row_ids() + start, n, resolved_.data());
  size_t num_frozen = 0;
  for (size_t i = 0; i < n; ++i) {
    if (i + kAheadSlots < n && resolved_[i + kAheadSlots] != RowIndex::kNone) {
      __builtin_prefetch(slots_ + resolved_[i + kAheadSlots]);
    }
    if (resolved_[i] == RowIndex::kNone) {
      missing.push_back(static_cast<uint32_t>(start + i));
    } else {
      records_[i] = floats(resolved_[i]);
      num_frozen += is_frozen(slots_[resolved_[i]]);
    }
  }
  if (!missing.empty()) return {UpdateOutcome::kMissing, missing.size()};
  if (num_frozen > shape_.num_aside - num_aside_) return {UpdateOutcome::kNoRoomAside, num_frozen};
  const bool keeps_rates = optimizer_.rule == Rule::kDenseAdam;
  if (keeps_rates && rates_.size() == rates_.capacity()) rates_.reserve(2 * rates_.size() + 64);
  StepHistory history = history_;
  history.append(lr);
  make_room_in_log(n);
  const size_t aside_before = num_aside_;
  if (num_frozen > 0) put_aside(n);
  const size_t bad = apply(rows, start, end, gradients, history.steps(), scratch, num_threads);
  if (bad != kAllFinite) {
    num_aside_ = aside_before;
    return {UpdateOutcome::kNotFinite, bad};
  }
  put_aside_ += num_aside_ - aside_before;
  for (size_t i = 0; i < n; ++i) {
    if (i + kAheadSlots < n) __builtin_prefetch(slots_ + resolved_[i + kAheadSlots], 1);
    touch(resolved_[i]);
  }
  if (end == rows.count()) {
    history_ = std::move(history);
    if (keeps_rates) rates_.push_back(lr);
  }
  return {UpdateOutcome::kDone, n};
}

// Copies those of n resolved rows that a commit froze, before they change.
void RowCache::put_aside(size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const RowSlot& slot = slots_[resolved_[i]];
    if (!is_frozen(slot)) continue;
    aside_rows_[num_aside_] = slot.row_id;
    std::memcpy(aside_ + num_aside_++ * shape_.record_bytes, record(resolved_[i]), shape_.record_bytes);
  }
}

// Changes the records of distinct rows start to end, `records_`; returns the first whose sum is not finite, if all rows
// are given.
size_t RowCache::apply(const DistinctRows& rows, size_t start, size_t end, const Gradients& gradients,
                       const Steps& steps, std::vector<float>& scratch, size_t num_threads) {
  if (start == 0 && end == rows.count()) {
    return apply_gradients(optimizer_, steps, rows, gradients, records_.data(), scratch.data(), scratch.size(),
                           num_threads);
  }
  const size_t each = std::min(kPartRows, scratch.size() / gradients.dim);
  const float* sums[kPartRows];
  for (size_t i = 0; i < each; ++i) sums[i] = scratch.data() + i * gradients.dim;
  for (size_t first = start; first < end; first += each) {
    const size_t until = std::min(end, first + each);
    sum_gradients(rows, gradients, first, until, scratch.data());
    update_rows(optimizer_, steps, gradients.dim, until - first, records_.data() + (first - start), sums, 1);
  }
  return kAllFinite;
}

uint32_t RowCache::num_steps() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return history_.last();
}

void RowCache::set_steps(uint32_t num_steps, const double* rates) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool keeps_rates = optimizer_.rule == Rule::kDenseAdam;
  if (keeps_rates) rates_.assign(rates, rates + num_steps);
  history_.restart(num_steps, keeps_rates ? rates : nullptr);
}

std::vector<double> RowCache::rates() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return rates_;
}

}  // namespace tierstore
