// Where the rows of a table in place lie: in planes, each in blocks of files that others wrote, or in packed pages.
//
// A plane is a range of bytes of every row. In blocks: its rows lie back to back in stretches of files, from any byte
// on, so a row lies in one block of 4 KiB or goes over the border of two; a block's checksum lies in a table apart. In
// packed pages: as a table's own rows do. A *unit* is a block or a page; units of a plane are numbered, in the order of
// its rows, and those of different stretches differ even if they share a block of a file. FORMAT.md draws it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "page_queue.h"
#include "pages.h"

namespace tierstore {

constexpr size_t kBlockBytes = 4096;
constexpr size_t kPlanesMax = 64;
constexpr size_t kWidthBytesMax = 64 * kBlockBytes;

// Rows from `row_start` on, back to back from `byte_start` of a file on. Its first block has the number `block_start`.
struct Stretch {
  uint64_t row_start, byte_start, block_start;
  uint32_t file;
};

struct PlaneSource {
  struct Place {
    uint64_t unit;  // the first that holds a part of the row
    uint32_t byte;  // from the start of that unit
    uint8_t num_units;
  };
  struct Range {
    const ShardFile* file;
    uint64_t byte_start;
    uint32_t num_bytes;
  };

  size_t width_bytes = 0, row_byte = 0;  // of a row; where they begin in it
  std::vector<ShardFile> files;
  std::vector<Stretch> stretches;       // ascending by row, and by block; none: packed pages
  const uint32_t* checksums = nullptr;  // of each block; the caller's memory
  uint32_t seed = 0;                    // of those
  PageShape shape{};                    // of packed pages
  uint64_t pages_per_shard = 1;
  const uint8_t* resident = nullptr;  // all rows of a packed plane, by row id; null: they are read

  bool in_blocks() const { return !stretches.empty(); }
  Place place(uint64_t row) const;
  // Where units lie: neighbours of one stretch, or one page. A file's last block may be short.
  Range range(uint64_t unit_start, uint64_t unit_end) const;
  // Checks what was read of a range; returns its first bad unit, or the end. `status` says what is wrong with it.
  uint64_t first_bad(const uint8_t* bytes, size_t num_bytes, uint64_t unit_start, PageStatus& status) const;
  // Bytes of the longest read of one row.
  size_t read_bytes_max() const;

 private:
  const Stretch& stretch_of_block(uint64_t block) const;
};

// The checksum of one block: CRC32C seeded with the table's seed and the block's number.
uint32_t block_checksum(const uint8_t* block, size_t num_bytes, uint64_t number, uint32_t seed);

// Writes the checksums of the blocks in `data`, numbered from block_start on; the last one may be short.
void block_checksums(const uint8_t* data, size_t num_bytes, uint64_t block_start, uint32_t seed, uint32_t* out);

}  // namespace tierstore
