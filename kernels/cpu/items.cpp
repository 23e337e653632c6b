#include "items.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

namespace tierstore {
namespace {

constexpr size_t kDigits = 16;  // bytes of an item
constexpr size_t kBuckets = 256;

// An item and where its weights are.
struct ItemAndRow {
  uint64_t high, low, row;
};

template <typename Record>
size_t digit(const Record& record, size_t place) {
  return (place < 8 ? record.low >> 8 * place : record.high >> 8 * (place - 8)) & (kBuckets - 1);
}

// Sorts by byte, the least first, and leaves out bytes that are the same in all. Eight million windows of text (four
// 17-bit ids, so 9 of 16 bytes) took 0.29 s, with digits of 11 bits 0.35 s (fewer passes, but more places to write to
// than the caches hold), std::sort 0.60 s; random items 0.39 to 0.74 s, and 0.88 s.
template <typename Record>
void radix_sort(Record* records, size_t num_records) {
  if (num_records < 2) return;
  std::vector<std::array<size_t, kBuckets>> starts(kDigits, std::array<size_t, kBuckets>{});
  for (size_t i = 0; i < num_records; ++i) {
    for (size_t place = 0; place < kDigits; ++place) ++starts[place][digit(records[i], place)];
  }
  std::vector<Record> scratch(num_records);
  Record *from = records, *to = scratch.data();
  for (size_t place = 0; place < kDigits; ++place) {
    std::array<size_t, kBuckets>& next = starts[place];
    if (next[digit(from[0], place)] == num_records) continue;
    size_t start = 0;
    for (size_t& bucket : next) start += std::exchange(bucket, start);
    for (size_t i = 0; i < num_records; ++i) to[next[digit(from[i], place)]++] = from[i];
    std::swap(from, to);
  }
  if (from != records) std::copy_n(from, num_records, records);
}

}  // namespace

int64_t windows_of_tokens(const int64_t* token_ids, size_t num_tokens, const Windows& shape, Item* out) {
  const unsigned newest = shape.bits * (shape.order_max - 1);
  Wide pads = 0;
  for (unsigned i = 0; i < shape.order_max; ++i) pads |= static_cast<Wide>(shape.pad_id) << i * shape.bits;
  Wide window = pads;
  uint64_t seen = 0;  // the bits of all ids
  for (size_t i = 0; i < num_tokens; ++i) {
    const int64_t id = token_ids[i];
    if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(shape.vocab_size)) return static_cast<int64_t>(i);
    const auto mapped = static_cast<uint64_t>(shape.token_map != nullptr ? shape.token_map[id] : id);
    seen |= mapped;
    window = window >> shape.bits | Wide{mapped} << newest;
    out[i] = Item::of(window);
    if (id == shape.barrier_id) window = pads;
  }
  return seen >> shape.bits == 0 ? -1 : kIdTooWide;
}

bool keys_of_windows(const Item* ngrams, size_t num_ngrams, unsigned order, unsigned bits, const int64_t* multipliers,
                     int64_t* out) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  Wide too_many = 0;
  for (size_t i = 0; i < num_ngrams; ++i) {
    Wide left = ngrams[i].value();
    uint64_t key = 0;
    for (unsigned back = order; back-- > 0; left >>= bits) {
      key ^= (static_cast<uint64_t>(left) & mask) * static_cast<uint64_t>(multipliers[back]);
    }
    too_many |= left;
    out[i] = static_cast<int64_t>(key);
  }
  return too_many == 0;
}

void sort_items(Item* items, size_t num_items, int64_t* weights, size_t num_weights) {
  if (weights == nullptr) return radix_sort(items, num_items);
  std::vector<ItemAndRow> records(num_items);
  for (size_t i = 0; i < num_items; ++i) records[i] = {items[i].high, items[i].low, i};
  radix_sort(records.data(), num_items);
  const std::vector<int64_t> given(weights, weights + num_items * num_weights);
  for (size_t i = 0; i < num_items; ++i) {
    items[i] = {records[i].high, records[i].low};
    std::copy_n(&given[records[i].row * num_weights], num_weights, weights + i * num_weights);
  }
}

size_t count_distinct(const Item* items, size_t num_items, unsigned shift) {
  size_t num_distinct = num_items > 0;
  for (size_t i = 1; i < num_items; ++i) {
    const Wide before = items[i - 1].value(), value = items[i].value();
    if (value < before) return kNotSorted;
    num_distinct += value >> shift != before >> shift;
  }
  return num_distinct;
}

void sum_items(const Item* items, size_t num_items, const int64_t* weights, size_t num_weights, unsigned shift,
               Item* distinct, int64_t* sums) {
  for (size_t i = 0; i < num_items; ++i) {
    const Wide value = items[i].value() >> shift;
    if (i == 0 || value != distinct[-1].value()) {
      *distinct++ = Item::of(value);
      std::fill_n(sums, num_weights, 0);
      sums += num_weights;
    }
    int64_t* sum = sums - num_weights;
    for (size_t column = 0; column < num_weights; ++column) {
      const int64_t weight = weights != nullptr ? weights[i * num_weights + column] : 1;
      sum[column] = static_cast<int64_t>(static_cast<uint64_t>(sum[column]) + static_cast<uint64_t>(weight));
    }
  }
}

void find_items(const Item* haystack, size_t haystack_size, const Item* needles, size_t num_needles, int64_t* out) {
  size_t place = 0;
  for (size_t i = 0; i < num_needles; ++i) {
    const Wide needle = needles[i].value();
    while (place < haystack_size && haystack[place].value() < needle) ++place;
    out[i] = place < haystack_size && haystack[place].value() == needle ? static_cast<int64_t>(place) : -1;
  }
}

}  // namespace tierstore
