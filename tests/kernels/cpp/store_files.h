// A small store for the C++ tests: shards and a placement in a folder, whose every word tells where it belongs.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "engine.h"

using namespace tierstore;

// Every word of an entry is told by its pair, so that a torn or strange entry shows.
inline void fill_entry(uint8_t* entry, size_t num_bytes, uint8_t order, int64_t key) {
  for (size_t i = 0; i + 8 <= num_bytes; i += 8) {
    const uint64_t word = (static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15ull) ^ (i << 8) ^ order;
    std::memcpy(entry + i, &word, 8);
  }
}

inline bool entry_is_whole(const uint8_t* entry, size_t num_bytes, uint8_t order, int64_t key) {
  std::vector<uint8_t> expected(num_bytes);
  fill_entry(expected.data(), num_bytes, order, key);
  return std::memcmp(entry, expected.data(), num_bytes) == 0;
}

// A table of one order and two rows a key, whose row r holds words told by r, in two shards under `folder`.
struct Files {
  static constexpr size_t kRowBytes = 264, kRowsPerPage = 15, kPageBytes = 4096, kPages = 300, kPagesPerShard = 200;
  static constexpr uint32_t kVersion = 1, kSeed = 77;
  static constexpr size_t kPlaced = 150, kLoadedStart = 20, kLoaded = 75,
                          kBuckets = 40;  // keys 0, kKeyStep, ... have records
  static constexpr int64_t kKeyStep = 1'000'003;
  std::vector<ShardFile> shards;
  ShardFile placed;
  std::vector<IndexBucket> index{kBuckets};
  std::vector<uint8_t> records;

  Files(const std::string& folder) {
    const PageShape shape{kPageBytes, kRowsPerPage, kVersion, kSeed};
    std::vector<uint8_t> rows(kPages * kRowsPerPage * kRowBytes), pages(kPages * kPageBytes);
    for (size_t row = 0; row < kPages * kRowsPerPage; ++row) {
      fill_entry(rows.data() + row * kRowBytes, kRowBytes, 0, static_cast<int64_t>(row));
    }
    seal_pages({{rows.data(), kRowBytes}}, kPages * kRowsPerPage, shape, 0, pages.data());
    for (size_t start = 0; start < kPages; start += kPagesPerShard) {
      const size_t num_bytes = std::min(kPagesPerShard, kPages - start) * kPageBytes;
      shards.push_back(write_file(folder + "/" + std::to_string(start), pages.data() + start * kPageBytes, num_bytes));
    }
    place(folder);
  }

  static RecordShape record_shape() { return {2 * kRowBytes, 2 * kRowBytes + kRecordTrailerBytes, kSeed}; }

  static ShardFile write_file(const std::string& name, const uint8_t* data, size_t num_bytes) {
    const int fd = open(name.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, data, num_bytes) != static_cast<ssize_t>(num_bytes)) std::abort();
    fsync(fd);
    void* map = mmap(nullptr, num_bytes, PROT_READ, MAP_SHARED, fd, 0);
    return {fd, open(name.c_str(), O_RDONLY | O_DIRECT), static_cast<uint8_t*>(map), num_bytes};
  }

  void place(const std::string& folder) {
    const RecordShape shape = record_shape();
    records.resize((kPlaced * shape.record_bytes + kReadUnitBytes - 1) / kReadUnitBytes * kReadUnitBytes);
    std::vector<int64_t> keys;
    std::vector<uint32_t> places, orders(kPlaced, 0);
    for (size_t i = 0; i < kPlaced; ++i) {
      keys.push_back(static_cast<int64_t>(i) * kKeyStep);
      places.push_back(static_cast<uint32_t>(i));
      uint8_t* record = records.data() + i * shape.record_bytes;
      fill_entry(record, kRowBytes, 0, keys[i] % 2003);
      fill_entry(record + kRowBytes, kRowBytes, 0, keys[i] % 2011 + 2003);
    }
    seal_records(keys.data(), orders.data(), kPlaced, shape, records.data());
    if (!index_entries(keys.data(), places.data(), kPlaced, index.data(), kBuckets)) std::abort();
    placed = write_file(folder + "/placed", records.data(), records.size());
  }

  IndexHead head{{0}, {kBuckets}};

  // After the last read.
  void close() const {
    std::vector<ShardFile> opened = shards;
    opened.push_back(placed);
    for (const ShardFile& file : opened) {
      munmap(const_cast<uint8_t*>(file.map), file.num_bytes);
      ::close(file.buffered_fd);
      if (file.direct_fd >= 0) ::close(file.direct_fd);
    }
  }

  Table table(Block& block, size_t num_sets) const {
    Table made;
    made.num_orders = 1;
    made.rows_per_key = 2;
    made.row_bytes = kRowBytes;
    made.num_rows = kPages * kRowsPerPage;
    made.is_plain = false;
    made.moduli = {2003, 2011};
    made.offsets = {0, 2003};
    made.page_bytes = kPageBytes;
    made.rows_per_page = kRowsPerPage;
    made.num_pages = kPages;
    made.pages_per_shard = kPagesPerShard;
    made.shape = {kPageBytes, kRowsPerPage, kVersion, kSeed};
    made.shards = shards;
    made.cache = std::make_shared<EntryCache>(block.data, num_sets, made.entry_bytes());
    made.cache->clear();
    made.statics.areas[0] = made.statics.areas[1] = {&head, index.data(), kBuckets};
    made.statics.records = records.data() + kLoadedStart * record_shape().record_bytes;
    made.statics.loaded_start = kLoadedStart;
    made.statics.num_loaded = kLoaded;
    made.statics.placed = {placed, 0, record_shape()};
    return made;
  }
};

inline bool rows_are_right(const int64_t* keys, size_t num_keys, const uint8_t* out) {
  for (size_t i = 0; i < num_keys; ++i) {
    const uint8_t* entry = out + i * 2 * Files::kRowBytes;
    const int64_t ids[] = {keys[i] % 2003, keys[i] % 2011 + 2003};
    for (int head = 0; head < 2; ++head) {
      if (!entry_is_whole(entry + head * Files::kRowBytes, Files::kRowBytes, 0, ids[head])) return false;
    }
  }
  return true;
}
