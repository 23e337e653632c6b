#include "table_module.h"

#include <pybind11/stl.h>
#include <sys/mman.h>

#include <stdexcept>
#include <tuple>

namespace py = pybind11;

namespace tierstore {
namespace {

IndexArea make_area(const py::tuple& pair, const Table& table, std::vector<py::array>& held) {
  const auto head = pair[0].cast<py::array_t<uint8_t, py::array::c_style>>();
  const auto buckets = pair[1].cast<py::array_t<uint8_t, py::array::c_style>>();
  require(head.nbytes() == sizeof(IndexHead) && reinterpret_cast<uintptr_t>(head.data()) % alignof(IndexHead) == 0 &&
              table.num_orders <= kOrdersMax,
          "a head is [128]");
  require(buckets.ndim() == 2 && buckets.shape(1) == sizeof(IndexBucket) &&
              reinterpret_cast<uintptr_t>(buckets.data()) % alignof(IndexBucket) == 0,
          "an index is [n, 64], at a multiple of 64");
  held.push_back(head);
  held.push_back(buckets);
  return {reinterpret_cast<const IndexHead*>(head.data()), reinterpret_cast<const IndexBucket*>(buckets.data()),
          static_cast<size_t>(buckets.shape(0))};
}

HeldCache make_cache(py::array_t<uint8_t, py::array::c_style> memory, size_t num_sets, size_t entry_bytes,
                     bool is_new) {
  require(num_sets >= 1 && static_cast<size_t>(memory.nbytes()) >= EntryCache::block_bytes(num_sets, entry_bytes) &&
              reinterpret_cast<uintptr_t>(memory.data()) % alignof(CacheSet) == 0,
          "memory holds the sets, at a multiple of 64");
  require(!is_new || memory.writeable(), "a new cache needs memory that can be written");
  const bool writable = memory.writeable();
  auto cache = std::make_shared<EntryCache>(const_cast<uint8_t*>(memory.data()), num_sets, entry_bytes, writable);
  if (is_new) {
    const py::gil_scoped_release released;
    cache->clear();
  }
  return {std::move(cache), std::move(memory)};
}

// Counts uses of (tagged order, key) pairs that readers saw.
void touch(HeldCache& held, const py::array_t<uint8_t, py::array::c_style>& orders,
           const py::array_t<int64_t, py::array::c_style>& keys) {
  require(held.cache->writable() && orders.size() == keys.size(), "a cache of one's own, an order for each key");
  const uint8_t* order = orders.data();
  const int64_t* key = keys.data();
  const auto count = static_cast<size_t>(keys.size());
  const py::gil_scoped_release released;
  const std::lock_guard<std::mutex> lock(held.cache->writer());
  for (size_t i = 0; i < count; ++i) held.cache->touch(order[i], key[i]);
}

void drop_tag(HeldCache& held, uint8_t tag) {
  require(held.cache->writable(), "a cache of one's own");
  const py::gil_scoped_release released;
  const std::lock_guard<std::mutex> lock(held.cache->writer());
  held.cache->drop_tag(tag);
}

}  // namespace

Table make_table(const py::dict& record, ReadMode mode) {
  Table table;
  table.num_orders = record["num_orders"].cast<size_t>();
  table.rows_per_key = record["rows_per_key"].cast<size_t>();
  table.row_bytes = record["row_bytes"].cast<size_t>();
  table.num_rows = record["num_rows"].cast<uint64_t>();
  table.is_plain = record["is_plain"].cast<bool>();
  table.moduli = record["moduli"].cast<std::vector<int64_t>>();
  table.offsets = record["offsets"].cast<std::vector<int64_t>>();
  table.page_bytes = record["page_bytes"].cast<size_t>();
  table.rows_per_page = record["rows_per_page"].cast<size_t>();
  table.num_pages = record["num_pages"].cast<uint64_t>();
  table.pages_per_shard = record["pages_per_shard"].cast<uint64_t>();
  table.shape = {table.page_bytes, table.rows_per_page, record["version"].cast<uint32_t>(),
                 record["seed"].cast<uint32_t>()};
  require(table.num_orders >= 1 && table.num_orders <= kOrdersMax, "a table has 1 to 16 orders");
  require(table.rows_per_key >= 1 && table.row_bytes >= 1, "a key has rows, and a row has bytes");
  require(table.moduli.size() == table.num_heads() && table.offsets.size() == table.num_heads(), "one modulus a head");
  require(table.page_bytes > kTrailerBytes && table.rows_per_page >= 1, "a page has rows and a trailer");
  require(table.rows_per_page <= (table.page_bytes - kTrailerBytes) / table.row_bytes, "a page's rows fit in it");
  require(table.pages_per_shard >= 1, "a shard has pages");
  require(table.num_rows <= table.num_pages * table.rows_per_page, "the pages hold the rows");
  for (size_t head = 0; head < table.num_heads(); ++head) {
    require(
        table.moduli[head] >= 1 && table.offsets[head] >= 0 &&
            static_cast<uint64_t>(table.moduli[head]) + static_cast<uint64_t>(table.offsets[head]) <= table.num_rows,
        "a head's rows lie within the table");
  }
  table.tag = record["tag"].cast<uint8_t>();
  require(table.tag < 16, "a tag is below 16");
  const auto shards = record["shards"].cast<std::vector<std::tuple<int, int, size_t>>>();
  require(shards.size() == (table.num_pages + table.pages_per_shard - 1) / table.pages_per_shard,
          "all shards are there");
  for (const auto& [buffered_fd, direct_fd, num_bytes] : shards) {
    ShardFile shard{buffered_fd, direct_fd, nullptr, num_bytes};
    if (mode == ReadMode::kMmap) {
      void* map = mmap(nullptr, num_bytes, PROT_READ, MAP_SHARED, buffered_fd, 0);
      if (map != MAP_FAILED) {
        madvise(map, num_bytes, MADV_RANDOM);
        shard.map = static_cast<const uint8_t*>(map);
      }
    }
    table.shards.push_back(shard);
  }
  return table;
}

// What a placement or a daemon gives a table; `held` keeps its memory alive.
StaticSet make_statics(const py::dict& record, const Table& table, ReadMode mode, std::vector<py::array>& held) {
  StaticSet statics;
  const auto areas = record["areas"].cast<std::vector<py::tuple>>();
  const auto records = record["records"].cast<py::array_t<uint8_t, py::array::c_style>>();
  const auto num_placed = record["num_placed"].cast<uint64_t>();
  statics.loaded_start = record["loaded_start"].cast<uint32_t>();
  require(areas.size() == 2, "an area for each parity of epochs");
  for (size_t parity = 0; parity < 2; ++parity) statics.areas[parity] = make_area(areas[parity], table, held);
  if (!record["in_file"].is_none()) statics.in_file = make_area(record["in_file"].cast<py::tuple>(), table, held);
  const size_t record_bytes = (table.entry_bytes() + 7) / 8 * 8 + kRecordTrailerBytes;
  statics.placed.shape = {table.entry_bytes(), record_bytes, table.shape.seed};
  statics.records = records.data();
  require(records.ndim() == 2 && records.shape(1) == static_cast<py::ssize_t>(record_bytes) &&
              static_cast<uint64_t>(records.shape(0)) + statics.loaded_start < kNotPlaced && num_placed < kNotPlaced,
          "records are [loaded, record_bytes], and their places 32 bits");
  statics.num_loaded = static_cast<uint32_t>(records.shape(0));
  held.push_back(records);
  if (record["file"].is_none()) return statics;
  const auto [buffered_fd, direct_fd, num_bytes] = record["file"].cast<std::tuple<int, int, size_t>>();
  statics.placed.file = {buffered_fd, direct_fd, nullptr, num_bytes};
  statics.placed.byte_start = record["byte_start"].cast<uint64_t>();
  require(
      statics.placed.byte_start <= num_bytes && num_placed <= (num_bytes - statics.placed.byte_start) / record_bytes,
      "the file holds the placed records");
  if (mode == ReadMode::kMmap) {
    void* map = mmap(nullptr, num_bytes, PROT_READ, MAP_SHARED, buffered_fd, 0);
    if (map != MAP_FAILED) {
      madvise(map, num_bytes, MADV_RANDOM);
      statics.placed.file.map = static_cast<const uint8_t*>(map);
    }
  }
  return statics;
}

void unmap(ShardFile& file) {
  if (file.map != nullptr) munmap(const_cast<uint8_t*>(file.map), file.num_bytes);
  file.map = nullptr;
}

void bind_entry_cache(py::module_& module) {
  py::class_<HeldCache>(module, "EntryCache", py::module_local())
      .def(py::init(&make_cache), py::arg("memory"), py::kw_only(), py::arg("num_sets"), py::arg("entry_bytes"),
           py::arg("is_new"))
      .def("count_accesses", [](HeldCache& held, uint64_t count) { held.cache->count_accesses(count); })
      .def("touch", &touch, py::arg("orders"), py::arg("keys"))
      .def("drop_tag", &drop_tag, py::arg("tag"));
}

}  // namespace tierstore
