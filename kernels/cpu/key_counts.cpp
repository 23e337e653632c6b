#include "key_counts.h"

#include <algorithm>
#include <cstring>

#include "mix.h"

namespace tierstore {
namespace {

constexpr size_t kAhead = 12;  // sets on their way from memory while one is counted in

bool is_of(const KeyCount& slot, uint16_t table, uint8_t order, int64_t key) {
  return slot.count != 0 && slot.key == key && slot.table == table && slot.order == order;
}

}  // namespace

KeyCounts::KeyCounts(uint8_t* memory, size_t num_sets)
    : sets_(reinterpret_cast<KeyCountSet*>(memory)), num_sets_(num_sets) {
  std::memset(memory, 0, num_sets * sizeof(KeyCountSet));
}

KeyCountSet& KeyCounts::set_of(uint16_t table, uint8_t order, int64_t key) const {
  const uint64_t kind = uint64_t{table} << 8 | order;
  return sets_[reduce(mix(static_cast<uint64_t>(key) + kind * 0x9E3779B97F4A7C15ull), num_sets_)];
}

size_t KeyCounts::add(const Report* reports, size_t num_reports) {
  const std::lock_guard<std::mutex> lock(at_work_);
  const auto prefetch = [&](size_t i) {
    if (i < num_reports) __builtin_prefetch(&set_of(reports[i].table, reports[i].order, reports[i].key), 1);
  };
  for (size_t i = 0; i < kAhead; ++i) prefetch(i);
  size_t num_counted = 0;
  for (size_t i = 0; i < num_reports; ++i) {
    prefetch(i + kAhead);
    if (reports[i].key < 0) continue;
    count(reports[i]);
    ++num_counted;
  }
  return num_counted;
}

void KeyCounts::count(const Report& report) {
  KeyCount* least = nullptr;  // the first of the smallest; an empty slot is the smallest there is
  for (KeyCount& slot : set_of(report.table, report.order, report.key).slots) {
    if (is_of(slot, report.table, report.order, report.key)) {
      slot.count = static_cast<uint32_t>(std::min<uint64_t>(UINT32_MAX, slot.count + report.weight()));
      return;
    }
    if (least == nullptr || slot.count < least->count) least = &slot;
  }
  const uint64_t weight = report.weight();
  if (weight < least->count) {
    least->count -= static_cast<uint32_t>(weight);
    return;
  }
  const auto rest = static_cast<uint32_t>(weight - least->count);  // weights are below 2^32
  num_used_ -= least->count != 0;
  num_used_ += rest != 0;
  *least = rest == 0 ? KeyCount{} : KeyCount{report.key, rest, report.table, report.order, 0};
}

void KeyCounts::counts(uint16_t table, const uint8_t* orders, bool one_order, const int64_t* keys, size_t num_keys,
                       uint32_t* out) const {
  const std::lock_guard<std::mutex> lock(at_work_);
  const auto order_of = [&](size_t i) { return orders[one_order ? 0 : i]; };
  for (size_t i = 0; i < num_keys; ++i) {
    if (i + kAhead < num_keys) __builtin_prefetch(&set_of(table, order_of(i + kAhead), keys[i + kAhead]));
    out[i] = 0;
    for (const KeyCount& slot : set_of(table, order_of(i), keys[i]).slots) {
      if (is_of(slot, table, order_of(i), keys[i])) out[i] = slot.count;
    }
  }
}

void KeyCounts::age() {
  const std::lock_guard<std::mutex> lock(at_work_);
  for (size_t i = 0; i < num_sets_; ++i) {
    for (KeyCount& slot : sets_[i].slots) {
      if (slot.count == 1) {
        slot = {};
        --num_used_;
      }
      slot.count /= 2;
    }
  }
}

size_t KeyCounts::num_above(uint16_t table, uint32_t minimum, SetRange sets) const {
  const std::lock_guard<std::mutex> lock(at_work_);
  size_t num_found = 0;
  for (size_t i = sets.begin; i < std::min(sets.end, num_sets_); ++i) {
    for (const KeyCount& slot : sets_[i].slots) num_found += slot.count >= minimum && slot.table == table;
  }
  return num_found;
}

size_t KeyCounts::copy_above(uint16_t table, uint32_t minimum, SetRange sets, const CountedKeys& out) const {
  const std::lock_guard<std::mutex> lock(at_work_);
  size_t num_found = 0;
  for (size_t i = sets.begin; i < std::min(sets.end, num_sets_); ++i) {
    for (const KeyCount& slot : sets_[i].slots) {
      if (slot.count < minimum || slot.table != table) continue;
      if (num_found == out.size) return num_found;
      out.order_index[num_found] = slot.order;
      out.keys[num_found] = slot.key;
      out.counts[num_found++] = slot.count;
    }
  }
  return num_found;
}

size_t KeyCounts::num_used() const {
  const std::lock_guard<std::mutex> lock(at_work_);
  return num_used_;
}

}  // namespace tierstore
