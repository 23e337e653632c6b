#include "lane.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <tuple>

namespace tierstore {
namespace {

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

constexpr size_t kLandedAtOnce = 32;  // between two looks at the clock, and at whether the job is cancelled

// So that a key that is asked for a million times is not copied to all its places at once: others wait for the job's
// lock meanwhile.
constexpr size_t kWaveMisses = 1 << 16;

constexpr uint64_t kPlacedRead = uint64_t{1} << 63;  // in place of a page number: a place in the placement file

size_t unit_bytes(const Table& table, uint8_t order) {
  return order == kPageUnit ? 0 : order == kRowUnit ? table.row_bytes : table.entry_bytes();
}

}  // namespace

Lane::Lane(const std::vector<Table>& tables, const LaneShape& shape, std::unique_ptr<PageQueue> queue,
           FaultPlan& faults, ReadCounters& counters)
    : tables_(tables),
      shape_(shape),
      queue_(std::move(queue)),
      faults_(faults),
      counters_(counters),
      flights_(shape.depth) {
  free_slots_.reserve(shape.depth);
  reads_.reserve(shape.depth);
  done_.reserve(shape.depth);
  void* memory =
      mmap(nullptr, round_up(shape.staging_bytes(), 4096), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  // The kernel writes into it at any time: a fork must neither copy it nor make the parent write to a copy.
  madvise(memory, round_up(shape.staging_bytes(), 4096), MADV_DONTFORK);
  staging_ = static_cast<uint8_t*>(memory);
  waves_[0].assembly = staging_ + shape.depth * shape.page_bytes;
  waves_[1].assembly = waves_[0].assembly + shape.assembly_bytes;
  for (size_t slot = shape.depth; slot-- > 0;) free_slots_.push_back(static_cast<uint32_t>(slot));
}

Lane::~Lane() {
  if (in_flight_ > 0) {
    queue_.release();
  } else if (staging_ != nullptr) {
    munmap(staging_, round_up(shape_.staging_bytes(), 4096));
  }
}

void Lane::abandon_after_fork() {
  queue_->abandon_after_fork();
  queue_.release();  // what is left of it may be in the middle of anything
  staging_ = nullptr;
  in_flight_ = 0;
}

void Lane::disown(const Fault& fault) {
  fail(fault);
  disowned_.misses.clear();
  disowned_.fault = fault;
  next_miss_ = 0;
  job_ = &disowned_;
}

void Lane::begin(Job& job) noexcept {
  job_ = &job;
  next_miss_ = 0;
  last_arrival_ = std::chrono::steady_clock::now();
  fill_waves();
  start_reads();
}

bool Lane::run(int slice_ms) noexcept {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(slice_ms);
  while (job_ != nullptr) {
    if (in_flight_ == 0 && !active(waves_[0]) && !active(waves_[1]) && next_miss_ == job_->misses.size()) {
      job_ = nullptr;
      break;
    }
    const auto now = std::chrono::steady_clock::now();
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - now);
    if (left.count() <= 0) return false;
    if (done_next_ == done_.size()) {
      done_.clear();
      done_next_ = 0;
      queue_->reap(done_, static_cast<int>(left.count()));
      if (done_.empty()) continue;
      last_arrival_ = now;  // a slice early at most
    }
    while (done_next_ < done_.size()) {
      land_some();
      if (done_next_ < done_.size() && std::chrono::steady_clock::now() >= until) return false;
    }
    fill_waves();
    start_reads();
  }
  return true;
}

// Lands a few of the pages that have arrived.
void Lane::land_some() {
  const std::lock_guard<std::mutex> lock(job_->writing);
  if (job_->cancelled() && job_->fault.kind == FaultKind::kNone) fail({FaultKind::kCancelled, 0, 0, 0});
  const size_t at_once = faults_.is_on() ? 1 : kLandedAtOnce;  // a slow read takes as long as many others
  for (size_t i = 0; i < at_once && done_next_ < done_.size(); ++i) land(done_[done_next_++]);
}

void Lane::fill_waves() {
  for (Wave& wave : waves_) {
    if (active(wave) || next_miss_ >= job_->misses.size()) continue;
    try {
      plan_wave(wave);
    } catch (const std::bad_alloc&) {
      wave.groups_left = 0;
      fail({FaultKind::kNoMemory, 0, 0, 0});
    }
  }
}

// Takes the next units of the job, as many as the assembly buffer holds and at least one, and says which rows they
// want. A unit with more places than a wave has is read again in the next one.
void Lane::plan_wave(Wave& wave) {
  const std::vector<Miss>& misses = job_->misses;
  wave.wants.clear();
  wave.group_starts.clear();
  wave.miss_start = next_miss_;
  uint8_t* to = wave.assembly;
  size_t pages_of_pages = 0;
  const size_t end = std::min(misses.size(), next_miss_ + kWaveMisses);
  while (next_miss_ < end) {
    const Miss& miss = misses[next_miss_];
    const size_t num_bytes = unit_bytes(tables_[miss.table], miss.order);
    if (next_miss_ > wave.miss_start &&
        (to + num_bytes > wave.assembly + shape_.assembly_bytes || pages_of_pages >= shape_.depth)) {
      break;
    }
    pages_of_pages += miss.order == kPageUnit;
    want_unit(wave, miss, to);
    to += num_bytes;
    for (++next_miss_; next_miss_ < end && misses[next_miss_].same_unit(miss);) ++next_miss_;
  }
  wave.miss_end = next_miss_;
  group_wants(wave);
}

// Notes what the unit of the job's next miss wants read, and that it is put together at `to`.
void Lane::want_unit(Wave& wave, const Miss& miss, uint8_t* to) {
  const Table& table = tables_[miss.table];
  if (miss.order == kPageUnit) {
    wave.wants.push_back({static_cast<uint64_t>(miss.key), miss.table, 0, static_cast<uint32_t>(table.page_bytes),
                          job_->outputs[miss.table] + miss.place * table.page_bytes});
    return;
  }
  if (miss.placed != kNotPlaced) {
    wave.wants.push_back({kPlacedRead | miss.placed, miss.table, static_cast<uint32_t>(next_miss_),
                          static_cast<uint32_t>(table.entry_bytes()), to});
    return;
  }
  const bool is_row = miss.order == kRowUnit;
  for (size_t row = 0; row < (is_row ? 1 : table.rows_per_key); ++row) {
    const uint64_t row_id =
        is_row ? static_cast<uint64_t>(miss.key) : table.row_id(miss.order * table.rows_per_key + row, miss.key);
    wave.wants.push_back({row_id / table.rows_per_page, miss.table, static_cast<uint32_t>(row_id % table.rows_per_page),
                          static_cast<uint32_t>(table.row_bytes), to + row * table.row_bytes});
  }
}

// Brings together what lies on the same page; from here on the wave is active.
void Lane::group_wants(Wave& wave) {
  std::sort(wave.wants.begin(), wave.wants.end(),
            [](const RowWant& a, const RowWant& b) { return std::tie(a.table, a.page) < std::tie(b.table, b.page); });
  for (size_t i = 0; i < wave.wants.size(); ++i) {
    const bool same_page =
        i > 0 && wave.wants[i].page == wave.wants[i - 1].page && wave.wants[i].table == wave.wants[i - 1].table;
    if (!same_page) wave.group_starts.push_back(i);
  }
  wave.group_starts.push_back(wave.wants.size());
  wave.groups_started = 0;
  wave.groups_left = wave.group_starts.size() - 1;
}

PageRead Lane::read_of(const Wave& wave, size_t group, uint32_t slot) {
  const RowWant& want = wave.wants[wave.group_starts[group]];
  const Table& table = tables_[want.table];
  if ((want.page & kPlacedRead) != 0) {
    const PlacedFile& placed = table.statics.placed;
    const auto place = static_cast<uint32_t>(want.page);
    return {&placed.file, placed.read_start(place), static_cast<uint32_t>(placed.read_bytes(place)), slot,
            staging_ + slot * shape_.page_bytes};
  }
  return {&table.shards[want.page / table.pages_per_shard], want.page % table.pages_per_shard * table.page_bytes,
          static_cast<uint32_t>(table.page_bytes), slot, staging_ + slot * shape_.page_bytes};
}

// Starts the oldest wave's reads first. Small top-ups wait until a quarter of the slots is free: fewer system calls.
void Lane::start_reads() {
  if (job_->fault.kind != FaultKind::kNone) return;
  if (in_flight_ > 0 && free_slots_.size() * 4 < shape_.depth) return;
  Wave* oldest = &waves_[0];
  Wave* other = &waves_[1];
  if (!active(*oldest) || (active(*other) && other->miss_start < oldest->miss_start)) std::swap(oldest, other);
  reads_.clear();
  for (Wave* wave : {oldest, other}) {
    while (active(*wave) && wave->groups_started + 1 < wave->group_starts.size() && !free_slots_.empty()) {
      const uint32_t slot = free_slots_.back();
      free_slots_.pop_back();
      flights_[slot] = {wave, wave->groups_started};
      reads_.push_back(read_of(*wave, wave->groups_started++, slot));
    }
  }
  in_flight_ += reads_.size();
  if (!reads_.empty()) queue_->start(reads_);
}

// Checks what arrived, puts its rows where they are wanted, and frees its slot.
void Lane::land(const PageDone& done) {
  Wave& wave = *flights_[done.slot].wave;
  const size_t group = flights_[done.slot].group;
  const RowWant& first = wave.wants[wave.group_starts[group]];
  --in_flight_;
  free_slots_.push_back(done.slot);
  if (job_->fault.kind == FaultKind::kNone) {
    const Fault fault = (first.page & kPlacedRead) != 0 ? land_placed(wave, group, done) : land_page(wave, group, done);
    if (fault.kind != FaultKind::kNone) fail(fault);
  }
  if (--wave.groups_left == 0 && job_->fault.kind == FaultKind::kNone) finish_wave(wave);
}

Fault Lane::land_page(const Wave& wave, size_t group, PageDone done) {
  const size_t start = wave.group_starts[group], end = wave.group_starts[group + 1];
  const Table& table = tables_[wave.wants[start].table];
  const auto number = static_cast<int64_t>(wave.wants[start].page);
  uint8_t* page = staging_ + done.slot * shape_.page_bytes;
  faults_.apply(done, page, table.page_bytes);
  if (done.error != 0) return {FaultKind::kDisk, wave.wants[start].table, number, done.error};
  uint8_t status = kPageGood;
  check_pages(page, 1, table.shape, &number, &status);
  if (status != kPageGood) return {FaultKind::kBadPage, wave.wants[start].table, number, status};
  counters_.pages.fetch_add(1, std::memory_order_relaxed);
  counters_.bytes.fetch_add(table.page_bytes, std::memory_order_relaxed);
  if (job_->misses.front().order >= kRowUnit)
    counters_.row_bytes.fetch_add(table.page_bytes, std::memory_order_relaxed);
  for (size_t i = start; i < end; ++i) {
    const RowWant& want = wave.wants[i];
    std::memcpy(want.to, page + want.which * table.row_bytes, want.num_bytes);
  }
  return {};
}

// An index may lead several keys to one record: whoever is not the one it names is told so, not handed its rows.
Fault Lane::land_placed(const Wave& wave, size_t group, PageDone done) {
  const size_t start = wave.group_starts[group], end = wave.group_starts[group + 1];
  const uint32_t table = wave.wants[start].table;
  const PlacedFile& placed = tables_[table].statics.placed;
  const auto place = static_cast<uint32_t>(wave.wants[start].page);
  uint8_t* record = staging_ + done.slot * shape_.page_bytes + (placed.record_start(place) - placed.read_start(place));
  faults_.apply(done, record, placed.shape.record_bytes);
  if (done.error != 0) return {FaultKind::kBadEntry, table, place, done.error};
  if (!record_is_whole(record, placed.shape)) return {FaultKind::kBadEntry, table, place, 0};
  counters_.entries.fetch_add(1, std::memory_order_relaxed);
  counters_.bytes.fetch_add(placed.read_bytes(place), std::memory_order_relaxed);
  for (size_t i = start; i < end; ++i) {
    const RowWant& want = wave.wants[i];
    const Miss& miss = job_->misses[want.which];
    if (!record_is_of(record, placed.shape, miss.order, miss.key)) return {FaultKind::kBadEntry, table, place, 0};
    std::memcpy(want.to, record, want.num_bytes);
  }
  return {};
}

// Copies a wave's units to every place that asked for them, and offers entries to their tables' caches.
void Lane::finish_wave(Wave& wave) {
  const std::vector<Miss>& misses = job_->misses;
  const uint8_t* from = wave.assembly;
  for (size_t i = wave.miss_start; i < wave.miss_end;) {
    const Miss& unit = misses[i];
    const Table& table = tables_[unit.table];
    const size_t num_bytes = unit_bytes(table, unit.order);
    size_t end = i;
    for (; end < wave.miss_end && misses[end].same_unit(unit); ++end) {
      if (unit.order != kPageUnit)
        std::memcpy(job_->outputs[unit.table] + misses[end].place * num_bytes, from, num_bytes);
    }
    if (unit.order < kOrdersMax && table.cache != nullptr && table.cache->writable()) {
      const std::lock_guard<std::mutex> lock(table.cache->writer());
      table.cache->offer(table.tagged(unit.order), unit.key, from);
    }
    from += num_bytes;
    i = end;
  }
}

// The first fault ends the job: nothing more is started, what is in flight is let land, and no rows are handed out.
void Lane::fail(const Fault& fault) {
  if (job_->fault.kind == FaultKind::kNone) job_->fault = fault;
  next_miss_ = job_->misses.size();
  for (Wave& wave : waves_) {
    if (!active(wave)) continue;
    const size_t never_started = wave.group_starts.size() - 1 - wave.groups_started;
    wave.groups_left -= never_started;
    wave.groups_started = wave.group_starts.size() - 1;
  }
}

}  // namespace tierstore
