#include "page_reader.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <tuple>

#include "racing_copy.h"

namespace tierstore {
namespace {

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

constexpr size_t kAwaitedMax = 32;       // reads that are waited for together, if they are the last
constexpr size_t kCompletedAtOnce = 32;  // between two looks at the clock, and at whether the job is cancelled

constexpr size_t kAskedForMax = 8192;  // bytes of a page that are asked for at once; of larger ones the start

// So that a key that is asked for a million times is not copied to all its entries at once: others wait for the job's
// lock meanwhile.
constexpr size_t kBatchMisses = 1 << 16;

// Of a table in place: a plane's index, above the number of one of its units.
constexpr unsigned kPlaneShift = 56;
constexpr uint64_t kUnitMask = (uint64_t{1} << kPlaneShift) - 1;
constexpr uint64_t kPlacedRead = uint64_t{1} << 63;  // in place of a page number: a record number of the placement file

size_t request_bytes(const Table& table, uint8_t order) {
  return order == kRowRequest ? table.row_bytes : table.entry_bytes();
}

}  // namespace

PageReader::PageReader(const std::vector<Table>& tables, const PageReaderShape& shape, std::unique_ptr<PageQueue> queue,
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
  queue_->register_memory(staging_, shape.depth * shape.page_bytes);
  batches_[0].assembly = staging_ + shape.depth * shape.page_bytes;
  batches_[1].assembly = batches_[0].assembly + shape.assembly_bytes;
  for (size_t slot = shape.depth; slot-- > 0;) free_slots_.push_back(static_cast<uint32_t>(slot));
}

PageReader::~PageReader() {
  if (in_flight_ > 0) {
    queue_->let_files_go();
    queue_.release();
  } else if (staging_ != nullptr) {
    munmap(staging_, round_up(shape_.staging_bytes(), 4096));
  }
}

void PageReader::abandon_after_fork() {
  queue_->abandon_after_fork();
  queue_.release();  // what is left of it may be in the middle of anything
  staging_ = nullptr;
  in_flight_ = 0;
}

void PageReader::abandon(const Fault& fault) {
  fail(fault);
  abandoned_.misses.clear();
  abandoned_.fault = fault;
  next_miss_ = 0;
  job_ = &abandoned_;
}

void PageReader::begin(Job& job) noexcept {
  job_ = &job;
  next_miss_ = 0;
  last_arrival_ = std::chrono::steady_clock::now();
  fill_batches();
  start_reads();
}

bool PageReader::run(int slice_ms) noexcept {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(slice_ms);
  while (job_ != nullptr) {
    if (in_flight_ == 0 && !active(batches_[0]) && !active(batches_[1]) && next_miss_ == job_->misses.size()) {
      job_ = nullptr;
      break;
    }
    const auto now = std::chrono::steady_clock::now();
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - now);
    if (left.count() <= 0) break;
    if (done_next_ == done_.size()) {
      done_.clear();
      done_next_ = 0;
      queue_->reap(done_, num_awaited(), static_cast<int>(left.count()));
      if (done_.empty()) continue;
      last_arrival_ = now;  // a slice early at most
    }
    while (done_next_ < done_.size()) {
      complete_some();
      if (done_next_ < done_.size() && std::chrono::steady_clock::now() >= until) {
        note_counts();
        return false;
      }
    }
    fill_batches();
    start_reads();
  }
  note_counts();
  queue_->send();  // who goes on may be another thread, and some time away
  return job_ == nullptr;
}

// How many reads are waited for at once: half of what is in flight, so that the queue never runs dry; of the last few,
// all, since their rows are not there sooner if some are copied before the others come.
size_t PageReader::num_awaited() const {
  const auto has_more = [this](const ReadBatch& batch) {
    return active(batch) && batch.groups_started + 1 < batch.group_starts.size();
  };
  const bool last = next_miss_ == job_->misses.size() && !has_more(batches_[0]) && !has_more(batches_[1]);
  return last && in_flight_ <= kAwaitedMax ? in_flight_ : std::max(size_t{1}, in_flight_ / 2);
}

// Completes a few of the reads that have arrived.
void PageReader::complete_some() {
  const std::lock_guard<std::mutex> lock(job_->writing);
  if (job_->cancelled() && job_->fault.kind == FaultKind::kNone) fail({FaultKind::kCancelled, 0, 0, 0});
  const size_t at_once = faults_.is_on() ? 1 : kCompletedAtOnce;  // a slow read takes as long as many others
  for (size_t i = 0; i < at_once && done_next_ < done_.size(); ++i) {
    const PageDone& done = done_[done_next_++];
    ask_for_next();
    complete(done);
  }
}

// A page that has just arrived is in no cache near this core: it comes while the one before is checked.
void PageReader::ask_for_next() const {
  if (done_next_ == done_.size()) return;
  fetch(staging_ + done_[done_next_].slot * shape_.page_bytes, std::min(shape_.page_bytes, kAskedForMax));
}

// Adds what was counted to the counters of all page readers.
void PageReader::note_counts() {
  if (counted_.bytes == 0) return;
  counters_.pages.fetch_add(counted_.pages, std::memory_order_relaxed);
  counters_.entries.fetch_add(counted_.entries, std::memory_order_relaxed);
  counters_.bytes.fetch_add(counted_.bytes, std::memory_order_relaxed);
  counters_.row_bytes.fetch_add(counted_.row_bytes, std::memory_order_relaxed);
  counted_ = {};
}

void PageReader::fill_batches() {
  for (ReadBatch& batch : batches_) {
    if (active(batch) || next_miss_ >= job_->misses.size()) continue;
    try {
      plan_batch(batch);
    } catch (const std::bad_alloc&) {
      batch.groups_left = 0;
      fail({FaultKind::kNoMemory, 0, 0, 0});
    }
  }
}

// Takes the next distinct requests of the job, as many as the assembly buffer holds and at least one, and lists the
// rows that they want. A request that repeats more often than a read batch has room for is read again in the next one.
void PageReader::plan_batch(ReadBatch& batch) {
  const std::vector<Miss>& misses = job_->misses;
  batch.wants.clear();
  batch.group_starts.clear();
  batch.miss_start = next_miss_;
  uint8_t* to = batch.assembly;
  const size_t end = std::min(misses.size(), next_miss_ + kBatchMisses);
  while (next_miss_ < end) {
    const Miss& miss = misses[next_miss_];
    const size_t num_bytes = request_bytes(tables_[miss.table], miss.order);
    if (next_miss_ > batch.miss_start && to + num_bytes > batch.assembly + shape_.assembly_bytes) break;
    want_rows(batch, miss, to);
    to += num_bytes;
    for (++next_miss_; next_miss_ < end && misses[next_miss_].same_request(miss);) ++next_miss_;
  }
  batch.miss_end = next_miss_;
  group_wants(batch);
}

// Whether the cache may take what a miss asks for.
bool PageReader::is_cached(const Miss& miss) const {
  const EntryCache* cache = tables_[miss.table].cache.get();
  return miss.order != kRowRequest && cache != nullptr && cache->writable();
}

// Lists what the job's next miss wants read, to be put together at `to` if it is assembled.
void PageReader::want_rows(ReadBatch& batch, const Miss& miss, uint8_t* to) {
  const Table& table = tables_[miss.table];
  const auto number = static_cast<uint32_t>(next_miss_ - batch.miss_start);
  if (!is_assembled(miss)) to = nullptr;
  if (miss.record_number != kNotPlaced) {
    batch.wants.push_back({kPlacedRead | miss.record_number, miss.table, 0, static_cast<uint32_t>(table.entry_bytes()),
                           number, 0, 1, to});
    return;
  }
  const bool is_row = miss.order == kRowRequest;
  for (uint32_t row = 0; row < (is_row ? 1 : table.rows_per_key); ++row) {
    const uint64_t row_id =
        is_row ? static_cast<uint64_t>(miss.key) : table.row_id(miss.order * table.rows_per_key + row, miss.key);
    RowWant want{row_id / table.rows_per_page,
                 miss.table,
                 static_cast<uint32_t>(row_id % table.rows_per_page * table.row_bytes),
                 static_cast<uint32_t>(table.row_bytes),
                 number,
                 row,
                 1,
                 to == nullptr ? nullptr : to + row * table.row_bytes};
    if (table.planes.empty()) {
      batch.wants.push_back(want);
    } else {
      want_planes(batch, row_id, want);
    }
  }
}

// Lists what a row of a table in place wants read, plane by plane; what memory holds is copied.
void PageReader::want_planes(ReadBatch& batch, uint64_t row_id, RowWant want) {
  const std::vector<PlaneSource>& planes = tables_[want.table].planes;
  uint8_t* const row_to = want.to;
  for (size_t i = 0; i < planes.size(); ++i) {
    const PlaneSource& plane = planes[i];
    want.to = row_to + plane.row_byte;
    if (plane.resident != nullptr) {
      std::memcpy(want.to, plane.resident + row_id * plane.width_bytes, plane.width_bytes);
      continue;
    }
    const PlaneSource::Place place = plane.place(row_id);
    want.page = uint64_t{i} << kPlaneShift | place.unit;
    want.byte = place.byte;
    want.num_bytes = static_cast<uint32_t>(plane.width_bytes);
    want.num_pages = place.num_units;
    batch.wants.push_back(want);
  }
}

// Brings together what lies on the same page, or in blocks that one read gets; from here on the read batch is active.
void PageReader::group_wants(ReadBatch& batch) {
  std::sort(batch.wants.begin(), batch.wants.end(),
            [](const RowWant& a, const RowWant& b) { return std::tie(a.table, a.page) < std::tie(b.table, b.page); });
  uint64_t read_end = 0, read_limit = 0;  // pages of the group so far; and the most that a slot has room for
  for (size_t i = 0; i < batch.wants.size(); ++i) {
    const RowWant& want = batch.wants[i];
    const uint64_t end = want.page + want.num_pages;
    const bool joins = i > 0 && want.table == batch.wants[i - 1].table && want.page < read_end && end <= read_limit;
    if (!joins) {
      batch.group_starts.push_back(i);
      read_limit = want.page + std::max<uint64_t>(1, shape_.page_bytes / kBlockBytes);
    }
    read_end = joins ? std::max(read_end, end) : end;
  }
  batch.group_starts.push_back(batch.wants.size());
  batch.groups_started = 0;
  batch.groups_left = batch.group_starts.size() - 1;
}

PageRead PageReader::read_of(const ReadBatch& batch, size_t group, uint32_t slot) {
  const RowWant& want = batch.wants[batch.group_starts[group]];
  const Table& table = tables_[want.table];
  if ((want.page & kPlacedRead) != 0) {
    const PlacedFile& placed = table.statics.placed;
    const auto number = static_cast<uint32_t>(want.page);
    return {&placed.file, placed.read_start(number), static_cast<uint32_t>(placed.read_bytes(number)), slot,
            staging_ + slot * shape_.page_bytes};
  }
  if (!table.planes.empty()) {
    const PlaneSource::Range range = range_of(batch, group);
    return {range.file, range.byte_start, range.num_bytes, slot, staging_ + slot * shape_.page_bytes};
  }
  return {&table.shards[want.page / table.pages_per_shard], want.page % table.pages_per_shard * table.page_bytes,
          static_cast<uint32_t>(table.page_bytes), slot, staging_ + slot * shape_.page_bytes};
}

// The units of a plane that a group reads: from its first row's first to the last that any of its rows needs.
PlaneSource::Range PageReader::range_of(const ReadBatch& batch, size_t group) const {
  const RowWant& first = batch.wants[batch.group_starts[group]];
  uint64_t end = 0;
  for (size_t i = batch.group_starts[group]; i < batch.group_starts[group + 1]; ++i) {
    end = std::max(end, batch.wants[i].page + batch.wants[i].num_pages);
  }
  const uint64_t start = first.page & kUnitMask;
  return tables_[first.table].planes[first.page >> kPlaneShift].range(start, start + (end - first.page));
}

// Starts the oldest read batch's reads first. Small top-ups wait until a quarter of the slots is free: fewer system
// calls.
void PageReader::start_reads() {
  if (job_->fault.kind != FaultKind::kNone) return;
  if (in_flight_ > 0 && free_slots_.size() * 4 < shape_.depth) return;
  ReadBatch* oldest = &batches_[0];
  ReadBatch* other = &batches_[1];
  if (!active(*oldest) || (active(*other) && other->miss_start < oldest->miss_start)) std::swap(oldest, other);
  reads_.clear();
  for (ReadBatch* batch : {oldest, other}) {
    while (active(*batch) && batch->groups_started + 1 < batch->group_starts.size() && !free_slots_.empty()) {
      const uint32_t slot = free_slots_.back();
      free_slots_.pop_back();
      flights_[slot] = {batch, batch->groups_started};
      reads_.push_back(read_of(*batch, batch->groups_started++, slot));
    }
  }
  in_flight_ += reads_.size();
  if (!reads_.empty()) queue_->start(reads_);
}

// Checks what arrived, puts its rows where they are wanted, and frees its slot.
void PageReader::complete(const PageDone& done) {
  ReadBatch& batch = *flights_[done.slot].batch;
  const size_t group = flights_[done.slot].group;
  const RowWant& first = batch.wants[batch.group_starts[group]];
  --in_flight_;
  free_slots_.push_back(done.slot);
  if (job_->fault.kind == FaultKind::kNone) {
    const Fault fault =
        (first.page & kPlacedRead) != 0 ? complete_placed(batch, group, done) : complete_page(batch, group, done);
    if (fault.kind != FaultKind::kNone) fail(fault);
  }
  if (--batch.groups_left == 0 && job_->fault.kind == FaultKind::kNone) finish_batch(batch);
}

Fault PageReader::complete_page(const ReadBatch& batch, size_t group, PageDone done) {
  const size_t start = batch.group_starts[group], end = batch.group_starts[group + 1];
  const Table& table = tables_[batch.wants[start].table];
  const auto number = static_cast<int64_t>(batch.wants[start].page);
  uint8_t* page = staging_ + done.slot * shape_.page_bytes;
  const size_t num_bytes = table.planes.empty() ? table.page_bytes : range_of(batch, group).num_bytes;
  faults_.apply(done, page, num_bytes);
  if (done.error != 0) return {FaultKind::kDisk, batch.wants[start].table, number, done.error};
  const Fault fault = check_page(table, batch.wants[start].table, batch.wants[start].page, num_bytes, page);
  if (fault.kind != FaultKind::kNone) return fault;
  ++counted_.pages;
  counted_.bytes += num_bytes;
  bool by_row_id = true;  // a page that a key wants too counts as the key's
  for (size_t i = start; i < end; ++i) {
    const RowWant& want = batch.wants[i];
    const uint8_t* row = page + (want.page - static_cast<uint64_t>(number)) * kBlockBytes + want.byte;
    by_row_id &= job_->misses[batch.miss_start + want.miss].order == kRowRequest;
    if (want.to != nullptr) {
      std::memcpy(want.to, row, want.num_bytes);
    } else {
      put_all(batch, want, row);
    }
  }
  if (by_row_id) counted_.row_bytes += num_bytes;
  return {};
}

// Returns what is wrong with a page, or with the first bad one of a plane's units, if anything.
Fault PageReader::check_page(const Table& table, uint32_t index, uint64_t page, size_t num_bytes,
                             const uint8_t* bytes) const {
  if (!table.planes.empty()) {
    const uint64_t start = page & kUnitMask;
    PageStatus status = kPageGood;
    const uint64_t bad = table.planes[page >> kPlaneShift].first_bad(bytes, num_bytes, start, status);
    if (status == kPageGood) return {};
    return {FaultKind::kBadPage, index, static_cast<int64_t>(page + (bad - start)), status};
  }
  const auto number = static_cast<int64_t>(page);
  uint8_t status = kPageGood;
  check_pages(bytes, 1, table.shape, &number, &status);
  if (status == kPageGood) return {};
  return {FaultKind::kBadPage, index, number, status};
}

// An index may lead several keys to one record: a key that the record does not name gets a fault, not its rows.
Fault PageReader::complete_placed(const ReadBatch& batch, size_t group, PageDone done) {
  const size_t start = batch.group_starts[group], end = batch.group_starts[group + 1];
  const uint32_t table = batch.wants[start].table;
  const PlacedFile& placed = tables_[table].statics.placed;
  const auto number = static_cast<uint32_t>(batch.wants[start].page);
  uint8_t* record =
      staging_ + done.slot * shape_.page_bytes + (placed.record_start(number) - placed.read_start(number));
  faults_.apply(done, record, placed.shape.record_bytes);
  if (done.error != 0) return {FaultKind::kBadEntry, table, number, done.error};
  if (!record_is_whole(record, placed.shape)) return {FaultKind::kBadEntry, table, number, 0};
  ++counted_.entries;
  counted_.bytes += placed.read_bytes(number);
  for (size_t i = start; i < end; ++i) {
    const RowWant& want = batch.wants[i];
    const Miss& miss = job_->misses[batch.miss_start + want.miss];
    if (!record_is_of(record, placed.shape, miss.order, miss.key)) return {FaultKind::kBadEntry, table, number, 0};
    if (want.to != nullptr) {
      std::memcpy(want.to, record, tables_[table].entry_bytes());
    } else {
      put_all(batch, want, record);
    }
  }
  return {};
}

// Copies what was put together for a read batch to every miss that asked for it, and offers entries to their tables'
// caches.
void PageReader::finish_batch(ReadBatch& batch) {
  const std::vector<Miss>& misses = job_->misses;
  const uint8_t* from = batch.assembly;
  for (size_t i = batch.miss_start; i < batch.miss_end;) {
    const Miss& request = misses[i];
    const bool assembled = is_assembled(request);
    size_t end = i;
    for (; end < batch.miss_end && misses[end].same_request(request); ++end) {
      if (assembled) put(misses[end], from);
    }
    if (is_cached(request)) {
      if (num_offers_ == kOfferedAtOnce || (num_offers_ > 0 && offers_[0].miss->table != request.table)) offer_some();
      offers_[num_offers_++] = {&request, from};
    }
    from += request_bytes(tables_[request.table], request.order);
    i = end;
  }
  offer_some();
}

// Offers entries of one table to its cache, several under one lock: page readers that write to one cache would wait for
// each other's cores with each entry. Their sets come from memory meanwhile.
void PageReader::offer_some() {
  if (num_offers_ == 0) return;
  const Table& table = tables_[offers_[0].miss->table];
  const auto ask_for_set = [&table](const Offer& offer) {
    fetch(reinterpret_cast<const uint8_t*>(table.cache->find_set(table.tagged(offer.miss->order), offer.miss->key)),
          sizeof(CacheSet));
  };
  for (size_t i = 0; i < num_offers_; ++i) ask_for_set(offers_[i]);
  const std::lock_guard<std::mutex> lock(table.cache->writer());
  for (size_t i = 0; i < num_offers_; ++i) {
    table.cache->offer(table.tagged(offers_[i].miss->order), offers_[i].miss->key, offers_[i].entry);
  }
  num_offers_ = 0;
}

// Copies a row, or a placed entry, to every miss that asked for what it is of.
void PageReader::put_all(const ReadBatch& batch, const RowWant& want, const uint8_t* from) {
  const std::vector<Miss>& misses = job_->misses;
  const Miss& request = misses[batch.miss_start + want.miss];
  const bool is_whole = (want.page & kPlacedRead) != 0;
  for (size_t i = batch.miss_start + want.miss; i < batch.miss_end && misses[i].same_request(request); ++i) {
    is_whole ? put(misses[i], from) : put_row(misses[i], want.row, from);
  }
}

// Copies what a miss asked for, an entry or a row, to where it wants it.
void PageReader::put(const Miss& miss, const uint8_t* from) {
  const Table& table = tables_[miss.table];
  const RowsOut& out = job_->outputs[miss.table];
  if (miss.order == kRowRequest) {
    put_row(miss, 0, from);
  } else if (out.is_plain()) {
    std::memcpy(out.rows + miss.index * table.entry_bytes(), from, table.entry_bytes());
  } else {
    for (size_t row = 0; row < table.rows_per_key; ++row) put_row(miss, row, from + row * table.row_bytes);
  }
}

// Copies one row of an entry, or the row that a miss asks for by its id.
void PageReader::put_row(const Miss& miss, size_t row, const uint8_t* from) {
  const Table& table = tables_[miss.table];
  const RowsOut& out = job_->outputs[miss.table];
  if (miss.order == kRowRequest) {  // is wanted, else it would not be asked for
    out.put(miss.index, from, table.row_bytes);
    return;
  }
  const auto row_id = static_cast<int64_t>(table.row_id(miss.order * table.rows_per_key + row, miss.key));
  out.put(miss.index * table.rows_per_key + row, out.wanted.holds(row_id) ? from : nullptr, table.row_bytes);
}

// The first fault ends the job: nothing more is started, what is in flight completes, and no rows are handed out.
void PageReader::fail(const Fault& fault) {
  if (job_->fault.kind == FaultKind::kNone) job_->fault = fault;
  next_miss_ = job_->misses.size();
  for (ReadBatch& batch : batches_) {
    if (!active(batch)) continue;
    const size_t never_started = batch.group_starts.size() - 1 - batch.groups_started;
    batch.groups_left -= never_started;
    batch.groups_started = batch.group_starts.size() - 1;
  }
}

}  // namespace tierstore
