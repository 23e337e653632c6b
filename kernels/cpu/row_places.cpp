#include "row_places.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <new>

#include "mix.h"

namespace tierstore {
namespace {

constexpr size_t kSortedRows = 1 << 17;      // that are put together, segment by segment,
constexpr size_t kRowsOfSegment = 16;        // if there are so many for each
constexpr size_t kAhead = 16;                // rows whose buckets are asked for before they are needed
constexpr unsigned kSegmentBitsMax = 9;      // 512 segments
constexpr size_t kSegmentBytes = 256 << 10;  // of a segment at least, once all rows are there
constexpr size_t kRowBytes = 18;             // of the index, on average
constexpr size_t kPageBytes = 4096;
constexpr double kGrowth = 1.25;
constexpr size_t kRowsOfBucket = 4;  // of 5 slots, at most, on average of a segment
constexpr double kSpreads = 8;       // standard deviations above the mean that no segment gets of new rows

unsigned segment_bits(uint64_t num_rows) {
  unsigned bits = 0;
  while (bits < kSegmentBitsMax && (num_rows * kRowBytes >> (bits + 1)) >= kSegmentBytes) ++bits;
  return bits;
}

uint64_t hash_of(int64_t row_id) { return mix(static_cast<uint64_t>(row_id)); }
uint32_t displaced_bit(uint64_t hash) { return 1u << (hash & 31); }
uint64_t packed(int64_t row_id, uint16_t run) { return (static_cast<uint64_t>(row_id) + 1) << 16 | run; }
int64_t row_of(uint64_t row) { return static_cast<int64_t>(row >> 16) - 1; }
uint16_t run_of(uint64_t row) { return static_cast<uint16_t>(row); }

size_t bytes_of(size_t num_buckets) { return (num_buckets * 64 + kPageBytes - 1) / kPageBytes * kPageBytes; }

}  // namespace

RowPlaces::RowPlaces(uint64_t num_rows)
    : num_rows_(num_rows), segment_bits_(segment_bits(num_rows)), segments_(size_t{1} << segment_bits_) {}

RowPlaces::~RowPlaces() {
  for (const Segment& segment : segments_) {
    if (segment.buckets != nullptr) munmap(segment.buckets, bytes_of(segment.num_buckets));
  }
}

RowPlaces::Bucket* RowPlaces::bucket_of(const Segment& segment, uint64_t hash) const {
  return segment.buckets + reduce(hash << segment_bits_, segment.num_buckets);
}

void RowPlaces::fetch(int64_t row_id) const {
  const uint64_t hash = hash_of(row_id);
  const Segment& segment = segments_[segment_of(hash)];
  if (segment.num_buckets > 0) __builtin_prefetch(bucket_of(segment, hash), 1);
}

RowPlaces::Slot RowPlaces::find_slot(int64_t row_id) const {
  const uint64_t hash = hash_of(row_id);
  const Segment& segment = segments_[segment_of(hash)];
  if (segment.num_buckets == 0) return {nullptr, nullptr};
  Bucket* const end = segment.buckets + segment.num_buckets;
  Bucket* bucket = bucket_of(segment, hash);
  for (size_t passed = 0; passed < segment.num_buckets; ++passed) {
    for (size_t slot = 0; slot < kSlots; ++slot) {
      if (bucket->rows[slot] >> 16 == static_cast<uint64_t>(row_id) + 1) {
        return {&bucket->rows[slot], &bucket->places[slot]};
      }
    }
    if ((bucket->displaced & displaced_bit(hash)) == 0) break;
    if (++bucket == end) bucket = segment.buckets;
  }
  return {nullptr, nullptr};
}

RowPlaces::Slot RowPlaces::empty_slot(const Segment& segment, Bucket* bucket, uint64_t hash) {
  Bucket* const end = segment.buckets + segment.num_buckets;
  for (;;) {
    for (size_t slot = 0; slot < kSlots; ++slot) {
      if (bucket->rows[slot] == 0) return {&bucket->rows[slot], &bucket->places[slot]};
    }
    bucket->displaced |= displaced_bit(hash);
    if (++bucket == end) bucket = segment.buckets;
  }
}

// How many buckets a segment has once it holds so many rows.
size_t RowPlaces::grown(size_t segment, size_t num_rows) const {
  size_t num_buckets = segments_[segment].num_buckets;
  if (num_buckets == 0) {
    const double spread = static_cast<double>(segment) / static_cast<double>(segments_.size());
    num_buckets = static_cast<size_t>(kPageBytes / sizeof(Bucket) * std::pow(kGrowth, spread));
  }
  while (num_buckets * kRowsOfBucket < num_rows) {
    num_buckets = static_cast<size_t>(static_cast<double>(num_buckets) * kGrowth) + 1;
  }
  return num_buckets;
}

void RowPlaces::grow(size_t index, size_t num_buckets) {
  Segment& segment = segments_[index];
  void* memory = mmap(nullptr, bytes_of(num_buckets), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  const Segment larger{static_cast<Bucket*>(memory), num_buckets, segment.num_rows};
  for (size_t i = 0; i < segment.num_buckets; ++i) {
    const Bucket& from = segment.buckets[i];
    for (size_t slot = 0; slot < kSlots; ++slot) {
      if (from.rows[slot] == 0) continue;
      const uint64_t hash = hash_of(row_of(from.rows[slot]));
      const Slot to = empty_slot(larger, bucket_of(larger, hash), hash);
      *to.row = from.rows[slot];
      *to.place = from.places[slot];
    }
  }
  num_bytes_ += bytes_of(num_buckets);
  if (segment.buckets != nullptr) {
    munmap(segment.buckets, bytes_of(segment.num_buckets));
    num_bytes_ -= bytes_of(segment.num_buckets);
  }
  segment = larger;
}

void RowPlaces::change_run(uint64_t& row, uint16_t run) {
  --live_[run_of(row)];
  ++live_[run];
  row = row >> 16 << 16 | run;
}

void RowPlaces::put_one(int64_t row_id, uint16_t run, uint32_t place) {
  const Slot found = find_slot(row_id);
  if (found.row != nullptr) {
    change_run(*found.row, run);
    *found.place = place;
    return;
  }
  const uint64_t hash = hash_of(row_id);
  const size_t index = segment_of(hash);
  Segment& segment = segments_[index];
  const size_t num_buckets = grown(index, segment.num_rows + 1);
  if (num_buckets != segment.num_buckets) grow(index, num_buckets);
  const Slot slot = empty_slot(segment, bucket_of(segment, hash), hash);
  *slot.row = packed(row_id, run);
  *slot.place = place;
  ++live_[run];
  ++segment.num_rows;
  ++num_found_;
}

// Segment by segment, so that few pages of memory are in use at a time: half the cost of rows in any order. Equal rows
// keep their order.
void RowPlaces::put_by_segment(const int64_t* row_ids, size_t count, uint16_t run, uint32_t place_start) {
  std::vector<uint32_t> at(segments_.size() + 1), order(count);
  for (size_t i = 0; i < count; ++i) ++at[segment_of(hash_of(row_ids[i])) + 1];
  for (size_t index = 1; index < at.size(); ++index) at[index] += at[index - 1];
  for (size_t i = 0; i < count; ++i) order[at[segment_of(hash_of(row_ids[i]))]++] = static_cast<uint32_t>(i);
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch(row_ids[order[i + kAhead]]);
    put_one(row_ids[order[i]], run, place_start + order[i]);
  }
}

void RowPlaces::put_in_order(const int64_t* row_ids, size_t count, uint16_t run, uint32_t place_start) {
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch(row_ids[i + kAhead]);
    put_one(row_ids[i], run, static_cast<uint32_t>(place_start + i));
  }
}

void RowPlaces::put(const int64_t* row_ids, size_t count, uint16_t run, uint32_t place_start) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (live_.size() <= run) live_.resize(run + size_t{1});
  for (size_t start = 0; start < count; start += kSortedRows) {
    const size_t part = std::min(count - start, kSortedRows);
    const auto first_place = static_cast<uint32_t>(place_start + start);
    if (part >= kRowsOfSegment * segments_.size()) {
      put_by_segment(row_ids + start, part, run, first_place);
    } else {
      put_in_order(row_ids + start, part, run, first_place);
    }
  }
}

size_t RowPlaces::find(const int64_t* row_ids, size_t count, uint16_t* runs, uint32_t* places) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t num_found = 0;
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch(row_ids[i + kAhead]);
    const Slot found = find_slot(row_ids[i]);
    runs[i] = found.row == nullptr ? kNoRun : run_of(*found.row);
    places[i] = found.row == nullptr ? kNoPlace : *found.place;
    num_found += found.row != nullptr;
  }
  return num_found;
}

size_t RowPlaces::move(const int64_t* row_ids, const uint16_t* runs, const uint32_t* places, size_t count, uint16_t run,
                       uint32_t place_start) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (live_.size() <= run) live_.resize(run + size_t{1});
  size_t num_moved = 0;
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch(row_ids[i + kAhead]);
    const Slot found = find_slot(row_ids[i]);
    if (found.row == nullptr || run_of(*found.row) != runs[i] || *found.place != places[i]) continue;
    change_run(*found.row, run);
    *found.place = static_cast<uint32_t>(place_start + i);
    ++num_moved;
  }
  return num_moved;
}

uint64_t RowPlaces::live(uint16_t run) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return run < live_.size() ? live_[run] : 0;
}

size_t RowPlaces::num_found() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_found_;
}

size_t RowPlaces::num_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_bytes_;
}

size_t RowPlaces::num_bytes_with(size_t num_more) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const double mean = static_cast<double>(num_more) / static_cast<double>(segments_.size());
  const size_t most = segments_.size() == 1 ? num_more : static_cast<size_t>(mean + kSpreads * std::sqrt(mean) + 1);
  const size_t num_new = std::min(num_more, most);
  size_t total = 0, largest = 0;
  for (size_t index = 0; index < segments_.size(); ++index) {
    const Segment& segment = segments_[index];
    total += bytes_of(num_new == 0 ? segment.num_buckets : grown(index, segment.num_rows + num_new));
    largest = std::max(largest, bytes_of(segment.num_buckets));
  }
  return num_new == 0 ? total : total + largest;
}

}  // namespace tierstore
