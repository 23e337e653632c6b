// Where the newest training record of a row lies: row id -> (run, place).
//
// Buckets of one cache line, as in entry_index.h, so that a search costs one line, nearly always:
//
//   uint64 rows[5] ((row id + 1) << 16 | run; 0: empty) | uint32 places[5] | uint32 displaced
//
// The upper bits of a row's hash choose one of up to 512 segments, which grow one by one, by a quarter each time: so
// there is never a copy of the whole beside the whole. First sizes are spread over that quarter, so that segments do
// not grow at the same time, and the index takes 18 bytes a row whatever their number: 16 in the fullest segments, 20
// in the emptiest. Rows never leave.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace tierstore {

constexpr uint16_t kNoRun = UINT16_MAX;
constexpr uint32_t kNoPlace = UINT32_MAX;

// Any thread may call: each call holds the mutex, and is one step to others.
class RowPlaces {
 public:
  static constexpr uint64_t kRowsMax = (uint64_t{1} << 48) - 1;

  // num_rows: of the table, at most kRowsMax; row ids are below it. Takes no memory for rows yet.
  explicit RowPlaces(uint64_t num_rows);
  ~RowPlaces();
  RowPlaces(const RowPlaces&) = delete;
  RowPlaces& operator=(const RowPlaces&) = delete;

  uint64_t num_rows() const { return num_rows_; }

  // Notes that the newest record of row_ids[i] is place_start + i of `run`. Of equal row ids the last counts. Throws
  // std::bad_alloc, and then has noted some of them.
  void put(const int64_t* row_ids, size_t count, uint16_t run, uint32_t place_start);

  // Writes run and place of each row, kNoRun and kNoPlace for one that has no record. Returns how many have.
  size_t find(const int64_t* row_ids, size_t count, uint16_t* runs, uint32_t* places) const;

  // Does what `put` does for the rows that still lie at runs[i], places[i]. Returns how many.
  size_t move(const int64_t* row_ids, const uint16_t* runs, const uint32_t* places, size_t count, uint16_t run,
              uint32_t place_start);

  // How many rows have their newest record in a run.
  uint64_t live(uint16_t run) const;
  size_t num_found() const;
  // Bytes of memory.
  size_t num_bytes() const;
  // The most bytes once so many rows are added, at the moment of growth included.
  size_t num_bytes_with(size_t num_more) const;

 private:
  static constexpr size_t kSlots = 5;
  struct alignas(64) Bucket {
    uint64_t rows[kSlots];
    uint32_t places[kSlots];
    uint32_t displaced;
  };
  static_assert(sizeof(Bucket) == 64, "a cache line");
  struct Segment {
    Bucket* buckets = nullptr;
    size_t num_buckets = 0;
    size_t num_rows = 0;
  };
  struct Slot {
    uint64_t* row;
    uint32_t* place;
  };

  size_t segment_of(uint64_t hash) const { return segment_bits_ == 0 ? 0 : hash >> (64 - segment_bits_); }
  Bucket* bucket_of(const Segment& segment, uint64_t hash) const;
  void fetch(int64_t row_id) const;
  // The slot of a row; null if it has none.
  Slot find_slot(int64_t row_id) const;
  // An empty slot for a row that has none; its segment has room.
  static Slot empty_slot(const Segment& segment, Bucket* bucket, uint64_t hash);
  size_t grown(size_t segment, size_t num_rows) const;
  void grow(size_t segment, size_t num_buckets);
  void put_one(int64_t row_id, uint16_t run, uint32_t place);
  void put_in_order(const int64_t* row_ids, size_t count, uint16_t run, uint32_t place_start);
  void put_by_segment(const int64_t* row_ids, size_t count, uint16_t run, uint32_t place_start);
  void change_run(uint64_t& row, uint16_t run);

  const uint64_t num_rows_;
  const unsigned segment_bits_;
  mutable std::mutex mutex_;       // guards all below
  std::vector<Segment> segments_;  // by the upper bits of the hash
  std::vector<uint64_t> live_;     // by run
  size_t num_found_ = 0;
  size_t num_bytes_ = 0;
};

}  // namespace tierstore
