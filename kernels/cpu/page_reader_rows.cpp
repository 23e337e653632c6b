// What has been read: checked, its rows put where they are wanted, finished entries offered to the caches.
#include <cstring>

#include "page_reader.h"
#include "racing_copy.h"

namespace tierstore {

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
  const size_t num_bytes = page_bytes_of(batch, group);
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
  if ((page & kVersionRead) != 0) {
    const PageStatus status = table.overlay.check(page, bytes);
    if (status == kPageGood) return {};
    return {FaultKind::kBadPage, index, static_cast<int64_t>(page), status};
  }
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
    from += request_bytes(request);
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

}  // namespace tierstore
