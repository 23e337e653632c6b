#include "block_source.h"

#include <algorithm>

#include "crc32c.h"

namespace tierstore {

const Stretch& PlaneSource::stretch_of_block(uint64_t block) const {
  const auto after = std::upper_bound(stretches.begin(), stretches.end(), block,
                                      [](uint64_t wanted, const Stretch& each) { return wanted < each.block_start; });
  return *(after - 1);  // no number below that of the first stretch is asked for
}

PlaneSource::Place PlaneSource::place(uint64_t row) const {
  if (!in_blocks()) {
    return {row / shape.rows_per_page, static_cast<uint32_t>(row % shape.rows_per_page * width_bytes), 1};
  }
  const auto after = std::upper_bound(stretches.begin(), stretches.end(), row,
                                      [](uint64_t wanted, const Stretch& each) { return wanted < each.row_start; });
  const Stretch& stretch = *(after - 1);
  const uint64_t byte = stretch.byte_start % kBlockBytes + (row - stretch.row_start) * width_bytes;
  const auto within = static_cast<uint32_t>(byte % kBlockBytes);
  const size_t num_units = (within + width_bytes + kBlockBytes - 1) / kBlockBytes;
  return {stretch.block_start + byte / kBlockBytes, within, static_cast<uint8_t>(num_units)};
}

PlaneSource::Range PlaneSource::range(uint64_t unit_start, uint64_t unit_end) const {
  if (!in_blocks()) {
    return {&files[unit_start / pages_per_shard], unit_start % pages_per_shard * shape.page_bytes,
            static_cast<uint32_t>(shape.page_bytes)};
  }
  const Stretch& stretch = stretch_of_block(unit_start);
  const ShardFile& file = files[stretch.file];
  const uint64_t first = stretch.byte_start / kBlockBytes + (unit_start - stretch.block_start);
  const uint64_t byte_start = first * kBlockBytes;
  const uint64_t num_bytes = std::min<uint64_t>((unit_end - unit_start) * kBlockBytes, file.num_bytes - byte_start);
  return {&file, byte_start, static_cast<uint32_t>(num_bytes)};
}

uint64_t PlaneSource::first_bad(const uint8_t* bytes, size_t num_bytes, uint64_t unit_start, PageStatus& status) const {
  if (!in_blocks()) {
    const auto number = static_cast<int64_t>(unit_start);
    uint8_t found = kPageGood;
    check_pages(bytes, 1, shape, &number, &found);
    status = static_cast<PageStatus>(found);
    return status == kPageGood ? unit_start + 1 : unit_start;
  }
  status = kPageGood;
  uint64_t block = unit_start;
  for (size_t at = 0; at < num_bytes; at += kBlockBytes, ++block) {
    if (block_checksum(bytes + at, std::min(kBlockBytes, num_bytes - at), block, seed) != checksums[block]) {
      status = kPageBadChecksum;
      break;
    }
  }
  return block;
}

size_t PlaneSource::read_bytes_max() const {
  if (!in_blocks()) return shape.page_bytes;
  return ((kBlockBytes - 1 + width_bytes + kBlockBytes - 1) / kBlockBytes) * kBlockBytes;
}

uint32_t block_checksum(const uint8_t* block, size_t num_bytes, uint64_t number, uint32_t seed) {
  uint8_t bytes[8];
  for (size_t i = 0; i < sizeof bytes; ++i) bytes[i] = static_cast<uint8_t>(number >> (8 * i));
  return crc32c(block, num_bytes, crc32c(bytes, sizeof bytes, seed));
}

void block_checksums(const uint8_t* data, size_t num_bytes, uint64_t block_start, uint32_t seed, uint32_t* out) {
  for (size_t at = 0; at < num_bytes; at += kBlockBytes) {
    *out++ = block_checksum(data + at, std::min(kBlockBytes, num_bytes - at), block_start++, seed);
  }
}

}  // namespace tierstore
