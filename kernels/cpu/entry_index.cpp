#include "entry_index.h"

#include <algorithm>
#include <cstring>

#include "crc32c.h"
#include "mix.h"

namespace tierstore {
namespace {

uint32_t displaced_bit(uint64_t hash) { return 1u << (hash & 31); }

uint64_t hash(int64_t key) { return mix(static_cast<uint64_t>(key)); }

}  // namespace

const IndexBucket* EntryIndex::find_bucket(int64_t key) const {
  return num_buckets == 0 ? nullptr : &buckets[reduce(hash(key), num_buckets)];
}

uint32_t EntryIndex::find(const IndexBucket* bucket, int64_t key) const {
  if (bucket == nullptr) return kNotPlaced;
  for (size_t passed = 0; passed < num_buckets; ++passed) {
    for (size_t slot = 0; slot < kBucketSlots; ++slot) {
      if (bucket->keys[slot] == key) return bucket->places[slot];
    }
    if ((bucket->displaced & displaced_bit(hash(key))) == 0) break;
    bucket = bucket + 1 == buckets + num_buckets ? buckets : bucket + 1;
  }
  return kNotPlaced;
}

bool index_entries(const int64_t* keys, const uint32_t* places, size_t num_keys, IndexBucket* buckets,
                   size_t num_buckets) {
  constexpr size_t kAhead = 16;
  if (num_keys > num_buckets * kBucketSlots) return false;
  clear_index(buckets, num_buckets);
  for (size_t i = 0; i < num_keys; ++i) {
    if (i + kAhead < num_keys) __builtin_prefetch(&buckets[reduce(hash(keys[i + kAhead]), num_buckets)], 1);
    const uint64_t hashed = hash(keys[i]);
    size_t at = reduce(hashed, num_buckets);
    for (;;) {
      int64_t* const end = buckets[at].keys + kBucketSlots;
      int64_t* const empty = std::find(buckets[at].keys, end, int64_t{-1});
      if (empty != end) {
        *empty = keys[i];
        buckets[at].places[empty - buckets[at].keys] = places[i];
        break;
      }
      buckets[at].displaced |= displaced_bit(hashed);
      at = at + 1 == num_buckets ? 0 : at + 1;
    }
  }
  return true;
}

void clear_index(IndexBucket* buckets, size_t num_buckets) {
  for (size_t i = 0; i < num_buckets; ++i) {
    std::fill_n(buckets[i].keys, kBucketSlots, int64_t{-1});
    std::fill_n(buckets[i].places, kBucketSlots, kNotPlaced);
    buckets[i].displaced = 0;
  }
}

bool put_entry(int64_t key, uint32_t place, IndexBucket* buckets, size_t num_buckets) {
  const uint64_t hashed = hash(key);
  size_t at = num_buckets == 0 ? 0 : reduce(hashed, num_buckets);
  // No key leaves an index, so none lies behind an empty slot on its way.
  for (size_t passed = 0; passed < num_buckets; ++passed) {
    IndexBucket& bucket = buckets[at];
    for (size_t slot = 0; slot < kBucketSlots; ++slot) {
      if (bucket.keys[slot] != key && bucket.keys[slot] != -1) continue;
      bucket.keys[slot] = key;
      bucket.places[slot] = place;
      return true;
    }
    bucket.displaced |= displaced_bit(hashed);
    at = at + 1 == num_buckets ? 0 : at + 1;
  }
  return false;
}

void seal_records(const int64_t* keys, const uint32_t* order_index, size_t num_records, const RecordShape& shape,
                  uint8_t* records) {
  for (size_t i = 0; i < num_records; ++i) {
    uint8_t* record = records + i * shape.record_bytes;
    uint8_t* trailer = record + shape.record_bytes - kRecordTrailerBytes;
    std::memset(record + shape.entry_bytes, 0, static_cast<size_t>(trailer - record) - shape.entry_bytes);
    std::memcpy(trailer, &keys[i], 8);
    std::memcpy(trailer + 8, &order_index[i], 4);
    const uint32_t checksum = crc32c(record, shape.record_bytes - 4, shape.seed);
    std::memcpy(trailer + 12, &checksum, 4);
  }
}

bool record_is_whole(const uint8_t* record, const RecordShape& shape) {
  uint32_t checksum;
  std::memcpy(&checksum, record + shape.record_bytes - 4, 4);
  return checksum == crc32c(record, shape.record_bytes - 4, shape.seed);
}

bool record_is_of(const uint8_t* record, const RecordShape& shape, uint32_t order_index, int64_t key) {
  const uint8_t* trailer = record + shape.record_bytes - kRecordTrailerBytes;
  return std::memcmp(trailer, &key, 8) == 0 && std::memcmp(trailer + 8, &order_index, 4) == 0;
}

size_t invalidate_bad_records(uint8_t* records, size_t num_records, const RecordShape& shape) {
  constexpr int64_t kNobody = -1;
  size_t num_bad = 0;
  for (size_t i = 0; i < num_records; ++i) {
    uint8_t* record = records + i * shape.record_bytes;
    if (record_is_whole(record, shape)) continue;
    std::memcpy(record + shape.record_bytes - kRecordTrailerBytes, &kNobody, 8);
    ++num_bad;
  }
  return num_bad;
}

size_t drop_bad_entries(const uint8_t* records, size_t loaded_start, size_t num_loaded, size_t num_placed,
                        const RecordShape& shape, uint32_t order_index, IndexBucket* buckets, size_t num_buckets) {
  size_t num_bad = 0;
  for (size_t i = 0; i < num_buckets; ++i) {
    for (size_t slot = 0; slot < kBucketSlots; ++slot) {
      int64_t& key = buckets[i].keys[slot];
      const uint32_t place = buckets[i].places[slot];
      const size_t loaded = place - loaded_start;  // wraps round below the first, and so is no record either
      if (key < 0 || (loaded >= num_loaded && place < num_placed)) continue;
      if (loaded < num_loaded && record_is_of(records + loaded * shape.record_bytes, shape, order_index, key)) continue;
      key = -1;
      ++num_bad;
    }
  }
  return num_bad;
}

}  // namespace tierstore
