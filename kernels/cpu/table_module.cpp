#include "table_module.h"

#include <pybind11/stl.h>
#include <sys/mman.h>

#include "blocks_module.h"
#include "hash_module.h"
#include "job.h"
#include "overlay_module.h"

namespace py = pybind11;

namespace tierstore {
namespace {

PyEntryCache make_cache(ByteArray memory, size_t num_sets, size_t entry_bytes, bool is_new) {
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
void touch(PyEntryCache& self, const ByteArray& orders, const Int64Array& keys) {
  require(self.cache->writable() && orders.size() == keys.size(), "a cache of one's own, an order for each key");
  const uint8_t* order = orders.data();
  const int64_t* key = keys.data();
  const auto count = static_cast<size_t>(keys.size());
  const py::gil_scoped_release released;
  const std::lock_guard<std::mutex> lock(self.cache->writer());
  for (size_t i = 0; i < count; ++i) self.cache->touch(order[i], key[i]);
}

void drop_tag(PyEntryCache& self, uint8_t tag) {
  require(self.cache->writable(), "a cache of one's own");
  const py::gil_scoped_release released;
  const std::lock_guard<std::mutex> lock(self.cache->writer());
  self.cache->drop_tag(tag);
}

// Without a map, reads of the file go through `pread`: see `shortfalls` of the engine.
void map_file(ShardFile& file) {
  if (file.buffered_fd < 0) return;
  void* map = mmap(nullptr, file.num_bytes, PROT_READ, MAP_SHARED, file.buffered_fd, 0);
  if (map == MAP_FAILED) return;
  madvise(map, file.num_bytes, MADV_RANDOM);
  file.map = static_cast<const uint8_t*>(map);
}

void check_table(const Table& table) {
  require(table.num_orders >= 1 && table.num_orders <= kOrdersMax, "a table has 1 to 16 orders");
  require(table.rows_per_key >= 1 && table.row_bytes >= 1, "a key has rows, and a row has bytes");
  require(table.moduli.size() == table.num_heads() && table.offsets.size() == table.num_heads(), "one modulus a head");
  require(table.page_bytes > kTrailerBytes && table.rows_per_page >= 1, "a page has rows and a trailer");
  require(table.pages_per_shard >= 1, "a shard has pages");
  require(table.num_rows <= table.num_pages * table.rows_per_page, "the pages hold the rows");
  for (size_t head = 0; head < table.num_heads(); ++head) {
    require(
        table.moduli[head] >= 1 && table.offsets[head] >= 0 &&
            static_cast<uint64_t>(table.moduli[head]) + static_cast<uint64_t>(table.offsets[head]) <= table.num_rows,
        "a head's rows lie within the table");
  }
  require(table.tag < 1 << kTagShift, "a tag is below 16");
}

// Pages of a table in place are ranges of rows, which lie in no shard.
void check_shards(const Table& table) {
  require(table.rows_per_page <= (table.page_bytes - kTrailerBytes) / table.row_bytes, "a page's rows fit in it");
  require(table.shards.size() == (table.num_pages + table.pages_per_shard - 1) / table.pages_per_shard,
          "all shards are there");
}

// residues: how many of an order's heads fix its keys, and their inverses, as `keys_of_row_ids` takes them.
void set_token_keys(Table& table, const PyKeyResidues& residues) {
  const auto& [num_residues, inverses] = residues;
  require(num_residues.size() == static_cast<py::ssize_t>(table.num_orders), "num_residues must be one an order");
  const AddressMap map{table.moduli.data(), table.offsets.data(), table.num_orders, table.rows_per_key};
  table.token_keys = std::make_shared<const TokenKeys>(map, key_residues(num_residues, inverses, map));
}

void set_memory(TableRecord& record, const py::object& memory) {
  Table& table = record.table;
  if (py::isinstance<PyEntryCache>(memory)) {
    const auto& own = memory.cast<const PyEntryCache&>();
    require(own.cache->entry_bytes() == table.entry_bytes(), "the cache is one of such entries");
    table.cache = own.cache;
    record.memory = own.memory;
  } else {
    record.memory = memory.cast<ByteArray>();
    require(static_cast<uint64_t>(record.memory.nbytes()) >= table.num_rows * table.row_bytes,
            "memory holds the resident rows");
  }
}

IndexArea area_of(const PyIndexArea& area, std::vector<py::array>& arrays) {
  const auto& [head, buckets] = area;
  require(head.nbytes() == sizeof(IndexHead) && reinterpret_cast<uintptr_t>(head.data()) % alignof(IndexHead) == 0,
          "a head is [128]");
  require(buckets.ndim() == 2 && buckets.shape(1) == sizeof(IndexBucket) &&
              reinterpret_cast<uintptr_t>(buckets.data()) % alignof(IndexBucket) == 0,
          "an index is [n, 64], at a multiple of 64");
  arrays.push_back(head);
  arrays.push_back(buckets);
  return {reinterpret_cast<const IndexHead*>(head.data()), reinterpret_cast<const IndexBucket*>(buckets.data()),
          static_cast<size_t>(buckets.shape(0))};
}

void set_statics(TableRecord& record, const StaticRecord& given) {
  const Table& table = record.table;
  StaticSet& statics = record.table.statics;
  require(table.cache != nullptr, "a resident table needs no static set");
  require(given.areas.size() == 2, "an area for each parity of epochs");
  for (size_t parity = 0; parity < 2; ++parity) {
    statics.areas[parity] = area_of(given.areas[parity], record.arrays);
  }
  if (given.in_file) statics.in_file = area_of(*given.in_file, record.arrays);
  const size_t record_bytes = (table.entry_bytes() + 7) / 8 * 8 + kRecordTrailerBytes;
  statics.placed.shape = {table.entry_bytes(), record_bytes, table.shape.seed};
  statics.loaded_start = given.loaded_start;
  const ByteArray& records = given.records;
  require(records.ndim() == 2 && records.shape(1) == static_cast<py::ssize_t>(record_bytes) &&
              static_cast<uint64_t>(records.shape(0)) + given.loaded_start < kNotPlaced &&
              given.num_placed < kNotPlaced,
          "records are [loaded, record_bytes], and their numbers 32 bits");
  statics.records = records.data();
  statics.num_loaded = static_cast<uint32_t>(records.shape(0));
  record.arrays.push_back(records);
  if (!given.file) return;
  statics.placed.file = file_of(*given.file);
  statics.placed.byte_start = given.byte_start;
  const size_t num_bytes = statics.placed.file.num_bytes;
  require(given.byte_start <= num_bytes && given.num_placed <= (num_bytes - given.byte_start) / record_bytes,
          "the file holds the placed records");
}

TableRecord make_record(size_t num_orders, size_t rows_per_key, size_t row_bytes, uint64_t num_rows, bool is_plain,
                        std::vector<int64_t> moduli, std::vector<int64_t> offsets, size_t page_bytes,
                        size_t rows_per_page, uint64_t num_pages, uint64_t pages_per_shard, uint32_t page_version,
                        uint32_t seed, const std::vector<FileHandle>& shards, const py::object& memory,
                        const StaticRecord* statics, uint8_t tag, const std::optional<PyKeyResidues>& residues,
                        const std::optional<std::vector<PlaneRecord>>& planes, const OverlayRecord* overlay) {
  TableRecord record;
  Table& table = record.table;
  table.num_orders = num_orders;
  table.rows_per_key = rows_per_key;
  table.row_bytes = row_bytes;
  table.num_rows = num_rows;
  table.is_plain = is_plain;
  table.moduli = std::move(moduli);
  table.offsets = std::move(offsets);
  table.page_bytes = page_bytes;
  table.rows_per_page = rows_per_page;
  table.num_pages = num_pages;
  table.pages_per_shard = pages_per_shard;
  table.shape = {page_bytes, rows_per_page, page_version, seed};
  table.tag = tag;
  for (const FileHandle& shard : shards) table.shards.push_back(file_of(shard));
  check_table(table);
  if (!planes) {
    check_shards(table);
  } else {
    table.planes = checked_planes(*planes, num_rows, row_bytes);
    for (const PlaneRecord& plane : *planes) {
      record.arrays.insert(record.arrays.end(), plane.arrays.begin(), plane.arrays.end());
    }
  }
  if (residues) set_token_keys(table, *residues);
  set_memory(record, memory);
  require(!planes || !planes->empty() || table.cache == nullptr, "a table in place that is not resident has planes");
  if (statics != nullptr) set_statics(record, *statics);
  if (overlay != nullptr) {
    table.overlay = checked_overlay(*overlay, row_bytes);
    record.arrays.push_back(overlay->buckets);
  }
  return record;
}

StaticRecord make_static_record(std::vector<PyIndexArea> areas, ByteArray records, uint64_t num_placed,
                                uint64_t byte_start, std::optional<FileHandle> file, std::optional<PyIndexArea> in_file,
                                uint32_t loaded_start) {
  return {std::move(areas), std::move(in_file), std::move(records), loaded_start, num_placed, file, byte_start};
}

}  // namespace

Table open_table(const TableRecord& record, ReadMode mode) {
  Table table = record.table;
  if (mode != ReadMode::kMmap) return table;
  Table::each_file(table, map_file);
  return table;
}

ShardFile file_of(const FileHandle& handle) {
  const auto [buffered_fd, direct_fd, num_bytes] = handle;
  return {buffered_fd, direct_fd, nullptr, num_bytes};
}

void unmap(ShardFile& file) {
  if (file.map != nullptr) munmap(const_cast<uint8_t*>(file.map), file.num_bytes);
  file.map = nullptr;
}

void bind_tables(py::module_& module) {
  py::class_<PyEntryCache>(module, "EntryCache", py::module_local())
      .def(py::init(&make_cache), py::arg("memory"), py::kw_only(), py::arg("num_sets"), py::arg("entry_bytes"),
           py::arg("is_new"))
      .def("count_accesses", [](PyEntryCache& self, uint64_t count) { self.cache->count_accesses(count); })
      .def("touch", &touch, py::arg("orders"), py::arg("keys"))
      .def("drop_tag", &drop_tag, py::arg("tag"));
  py::class_<StaticRecord>(module, "StaticRecord", py::module_local())
      .def(py::init(&make_static_record), py::kw_only(), py::arg("areas"), py::arg("records"), py::arg("num_placed"),
           py::arg("byte_start"), py::arg("file"), py::arg("in_file") = py::none(), py::arg("loaded_start") = 0)
      .def_readonly("areas", &StaticRecord::areas)
      .def_readonly("records", &StaticRecord::records);
  py::class_<TableRecord>(module, "TableRecord", py::module_local())
      .def(py::init(&make_record), py::kw_only(), py::arg("num_orders"), py::arg("rows_per_key"), py::arg("row_bytes"),
           py::arg("num_rows"), py::arg("is_plain"), py::arg("moduli"), py::arg("offsets"), py::arg("page_bytes"),
           py::arg("rows_per_page"), py::arg("num_pages"), py::arg("pages_per_shard"), py::arg("page_version"),
           py::arg("seed"), py::arg("shards"), py::arg("memory"), py::arg("statics") = py::none(), py::arg("tag") = 0,
           py::arg("residues") = py::none(), py::arg("planes") = py::none(), py::arg("overlay") = py::none());
}

}  // namespace tierstore
