// Placed entries: the index that finds one by its key, and the record that it lies in.
//
// An index serves one order of one table. It is an array of buckets of one cache line, and has no pointers, so that a
// file, another process or a GPU can hold it as it is:
//
//   int64 keys[5] (-1: empty) | uint32 places[5] | uint32 displaced
//
// A key's bucket is the high half of mix(key) * num_buckets (Lemire, "Fast random integer generation", 2019). A key
// that finds it full goes to the next one with room, and sets its bit, mix(key) % 32, in `displaced` of every bucket
// that it passed: a search goes on only where that bit is set, so that a key that is not there costs one line, nearly
// always.
//
// A record is an entry, zeros up to a multiple of 8, its key (i64), its order's index (u32), and the CRC32C (u32) of
// all before it, seeded with the table's page seed. FORMAT.md draws both.
#pragma once

#include <cstddef>
#include <cstdint>

#include "page_queue.h"

namespace tierstore {

constexpr size_t kBucketSlots = 5;
constexpr size_t kRecordTrailerBytes = 16;
constexpr size_t kReadUnitBytes = 4096;  // placed entries are read in whole ones, as O_DIRECT wants
constexpr uint32_t kNotPlaced = UINT32_MAX;

struct alignas(64) IndexBucket {
  int64_t keys[kBucketSlots];
  uint32_t places[kBucketSlots];
  uint32_t displaced;
};
static_assert(sizeof(IndexBucket) == 64, "a cache line");

struct EntryIndex {
  const IndexBucket* buckets = nullptr;
  size_t num_buckets = 0;

  const IndexBucket* find_bucket(int64_t key) const;
  // Returns the place of a key, kNotPlaced where it has none; `bucket` is its `find_bucket`.
  uint32_t find(const IndexBucket* bucket, int64_t key) const;
};

// Fills num_buckets buckets with keys, all different and not below 0, each with its place. Returns false where they do
// not fit.
bool index_entries(const int64_t* keys, const uint32_t* places, size_t num_keys, IndexBucket* buckets,
                   size_t num_buckets);

// Empties an index; and enters a key, or gives one that is there another place. Returns false if there is no room.
void clear_index(IndexBucket* buckets, size_t num_buckets);
bool put_entry(int64_t key, uint32_t place, IndexBucket* buckets, size_t num_buckets);

struct RecordShape {
  size_t entry_bytes;
  size_t record_bytes;  // entry, padding and trailer: a multiple of 8
  uint32_t seed;
};

// Writes padding and trailers of num_records records that hold their entries.
void seal_records(const int64_t* keys, const uint32_t* order_index, size_t num_records, const RecordShape& shape,
                  uint8_t* records);

// Says whether a record is whole, by its checksum; and whether it is that of (order, key), by its trailer alone.
bool record_is_whole(const uint8_t* record, const RecordShape& shape);
bool record_is_of(const uint8_t* record, const RecordShape& shape, uint32_t order_index, int64_t key);

// Checks records and marks those that are not whole, by a key of -1, as nobody's; returns how many.
size_t invalidate_bad_records(uint8_t* records, size_t num_records, const RecordShape& shape);

// Where records lie in a placement file.
struct PlacedFile {
  ShardFile file;
  uint64_t byte_start = 0;  // of the first record
  RecordShape shape{};

  uint64_t record_start(uint32_t place) const { return byte_start + uint64_t{place} * shape.record_bytes; }
  // The most that a read of one record takes: records begin at multiples of 8.
  size_t read_bytes_max() const {
    return (shape.record_bytes + kReadUnitBytes - 8 + kReadUnitBytes - 1) / kReadUnitBytes * kReadUnitBytes;
  }
  // The read of whole units that holds a record.
  uint64_t read_start(uint32_t place) const { return record_start(place) / kReadUnitBytes * kReadUnitBytes; }
  size_t read_bytes(uint32_t place) const {
    const uint64_t end = record_start(place) + shape.record_bytes;
    return (end + kReadUnitBytes - 1) / kReadUnitBytes * kReadUnitBytes - read_start(place);
  }
};

// Which buckets of an area belong to each order. Lies in shared memory beside the area where a daemon publishes it.
struct IndexHead {
  uint32_t bucket_start[16];
  uint32_t num_buckets[16];
};
static_assert(sizeof(IndexHead) == 128, "two cache lines");

// An area of buckets with its head.
struct IndexArea {
  const IndexHead* head = nullptr;
  const IndexBucket* buckets = nullptr;
  size_t num_buckets = 0;

  // The index of one order; empty where the head points outside the area. Another process may be writing the head: each
  // number is loaded once, so that what is checked is what is used.
  EntryIndex order(size_t order) const {
    const size_t start = __atomic_load_n(&head->bucket_start[order], __ATOMIC_RELAXED);
    const size_t count = __atomic_load_n(&head->num_buckets[order], __ATOMIC_RELAXED);
    return start <= num_buckets && count <= num_buckets - start ? EntryIndex{buckets + start, count} : EntryIndex{};
  }
};

// The placed entries of a table. Those with places loaded_start .. loaded_start + num_loaded - 1 lie in memory, as
// records one after the other; the others are read from the placement file. Places below loaded_start are of entries
// that another tier holds. Immutable within an epoch: epoch e finds them by areas[e % 2], in a store of its own process
// by either. There places in memory and in the file are the same; where a daemon moves entries, `in_file` has the
// places in the file.
struct StaticSet {
  IndexArea areas[2];
  IndexArea in_file;
  const uint8_t* records = nullptr;  // null: no records
  uint32_t loaded_start = 0;
  uint32_t num_loaded = 0;
  PlacedFile placed;

  // Whether a place's record lies in memory; that of kNotPlaced does not: loaded_start + num_loaded is no more than it.
  bool loads(uint32_t place) const { return place - loaded_start < num_loaded; }
  const uint8_t* record(uint32_t place) const {
    return records + size_t{place - loaded_start} * placed.shape.record_bytes;
  }
  // Where a key that memory does not hold lies in the file; `found` is what the epoch's area has for it.
  uint32_t place_in_file(uint8_t order, int64_t key, uint32_t found) const {
    if (placed.file.buffered_fd < 0) return kNotPlaced;
    if (in_file.head == nullptr) return found;
    const EntryIndex index = in_file.order(order);
    return index.find(index.find_bucket(key), key);
  }
};

// Takes keys out of an index whose places are loaded and hold another record, or lie outside the placement; returns how
// many. The records are those of places loaded_start on.
size_t drop_bad_entries(const uint8_t* records, size_t loaded_start, size_t num_loaded, size_t num_placed,
                        const RecordShape& shape, uint32_t order_index, IndexBucket* buckets, size_t num_buckets);

}  // namespace tierstore
