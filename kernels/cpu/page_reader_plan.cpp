// What a job wants read: requests become wants, wants become reads of pages, blocks and placed entries.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "page_reader.h"

namespace tierstore {
namespace {

// So that a key that is asked for a million times is not copied to all its entries at once: others wait for the job's
// lock meanwhile.
constexpr size_t kBatchMisses = 1 << 16;

}  // namespace

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
    const size_t num_bytes = request_bytes(miss);
    if (next_miss_ > batch.miss_start && to + num_bytes > batch.assembly + shape_.assembly_bytes) break;
    want_rows(batch, miss, to);
    to += num_bytes;
    for (++next_miss_; next_miss_ < end && misses[next_miss_].same_request(miss);) ++next_miss_;
  }
  batch.miss_end = next_miss_;
  group_wants(batch);
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
  const size_t num_rows = is_row ? 1 : table.rows_per_key;
  const auto row_id = [&](size_t row) {
    return is_row ? static_cast<uint64_t>(miss.key) : table.row_id(miss.order * table.rows_per_key + row, miss.key);
  };
  const bool on_pages = table.overlay.is_empty() && table.planes.empty();
  for (size_t row = 0; !table.overlay.is_empty() && row < num_rows; ++row) table.overlay.ask_for(row_id(row));
  for (size_t row = 0; row < num_rows; ++row) {
    const uint64_t id = row_id(row);
    const RowWant want{id / table.rows_per_page,
                       miss.table,
                       static_cast<uint32_t>(id % table.rows_per_page * table.row_bytes),
                       static_cast<uint32_t>(table.row_bytes),
                       number,
                       static_cast<uint32_t>(row),
                       1,
                       to == nullptr ? nullptr : to + row * table.row_bytes};
    if (on_pages) {
      batch.wants.push_back(want);
    } else {
      want_elsewhere(batch, id, want);
    }
  }
}

// Lists where a row lies if a version may have it, or planes: on a page of the newest version that has it, else where
// the base has it. `want` is its page of the table's own.
void PageReader::want_elsewhere(ReadBatch& batch, uint64_t row_id, RowWant want) {
  const Table& table = tables_[want.table];
  const uint32_t place = table.overlay.is_empty() ? kNotPlaced : table.overlay.find(row_id);
  if (place != kNotPlaced) {
    const RowOverlay::Row row = table.overlay.row(place);
    want.page = row.page;
    want.byte = row.byte;
  } else if (!table.planes.empty()) {
    want_planes(batch, row_id, want);
    return;
  }
  batch.wants.push_back(want);
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
  if ((want.page & kVersionRead) != 0) {
    const RowOverlay& overlay = table.overlay;
    return {&overlay.file_of(want.page).file, overlay.byte_start(want.page),
            static_cast<uint32_t>(overlay.shape.page_bytes), slot, staging_ + slot * shape_.page_bytes};
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

// Bytes of the page, or of a plane's units, that a group reads.
size_t PageReader::page_bytes_of(const ReadBatch& batch, size_t group) const {
  const RowWant& first = batch.wants[batch.group_starts[group]];
  const Table& table = tables_[first.table];
  if ((first.page & kVersionRead) != 0) return table.overlay.shape.page_bytes;
  return table.planes.empty() ? table.page_bytes : range_of(batch, group).num_bytes;
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

}  // namespace tierstore
