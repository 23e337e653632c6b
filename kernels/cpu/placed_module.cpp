// The Python face of placed entries: argument checks, then the work with the interpreter lock released.
#include "arrays.h"
#include "entry_index.h"
#include "modules.h"

namespace py = pybind11;

namespace tierstore {
namespace {

size_t num_buckets(const ByteArray& buckets) {
  require(buckets.ndim() == 2 && buckets.shape(1) == sizeof(IndexBucket), "buckets must be [n, 64]");
  require(reinterpret_cast<uintptr_t>(buckets.data()) % alignof(int64_t) == 0, "buckets must be at a multiple of 8");
  return static_cast<size_t>(buckets.shape(0));
}

RecordShape record_shape(const ByteArray& records, py::ssize_t entry_bytes, uint32_t seed) {
  require(records.ndim() == 2, "records must be [n, record_bytes]");
  const py::ssize_t record_bytes = records.shape(1);
  require(entry_bytes >= 1 && record_bytes == (entry_bytes + 7) / 8 * 8 + static_cast<py::ssize_t>(kRecordTrailerBytes),
          "a record is its entry up to a multiple of 8, and 16 bytes");
  return {static_cast<size_t>(entry_bytes), static_cast<size_t>(record_bytes), seed};
}

bool index_entries_checked(const Int64Array& keys, const UInt32Array& record_numbers, ByteArray buckets) {
  require(keys.ndim() == 1 && record_numbers.ndim() == 1 && keys.shape(0) == record_numbers.shape(0),
          "keys and record_numbers must be [n]");
  const size_t size = num_buckets(buckets), num_keys = static_cast<size_t>(keys.shape(0));
  const int64_t* key_data = keys.data();
  const uint32_t* numbers = record_numbers.data();
  auto* out = reinterpret_cast<IndexBucket*>(buckets.mutable_data());
  py::gil_scoped_release released;
  for (size_t i = 0; i < num_keys; ++i) require(key_data[i] >= 0, "keys must not be below 0");
  return index_entries(key_data, numbers, num_keys, out, size);
}

Int64Array find_entries_checked(const ByteArray& buckets, const Int64Array& keys) {
  require(keys.ndim() == 1, "keys must be [n]");
  Int64Array found(keys.shape(0));
  const EntryIndex index{reinterpret_cast<const IndexBucket*>(buckets.data()), num_buckets(buckets)};
  const int64_t* key_data = keys.data();
  int64_t* out = found.mutable_data();
  const auto num_keys = static_cast<size_t>(keys.shape(0));
  {
    py::gil_scoped_release released;
    for (size_t i = 0; i < num_keys; ++i) {
      const uint32_t number = key_data[i] < 0 ? kNotPlaced : index.find(index.find_bucket(key_data[i]), key_data[i]);
      out[i] = number == kNotPlaced ? -1 : int64_t{number};
    }
  }
  return found;
}

void seal_records_checked(ByteArray records, const Int64Array& keys, const UInt32Array& order_index,
                          py::ssize_t entry_bytes, uint32_t seed) {
  const RecordShape shape = record_shape(records, entry_bytes, seed);
  require(keys.ndim() == 1 && order_index.ndim() == 1 && keys.shape(0) == records.shape(0) &&
              order_index.shape(0) == records.shape(0),
          "keys and order_index must be [n]");
  const int64_t* key_data = keys.data();
  const uint32_t* order_data = order_index.data();
  uint8_t* out = records.mutable_data();
  const auto num_records = static_cast<size_t>(records.shape(0));
  py::gil_scoped_release released;
  seal_records(key_data, order_data, num_records, shape, out);
}

size_t invalidate_bad_records_checked(ByteArray records, py::ssize_t entry_bytes, uint32_t seed) {
  const RecordShape shape = record_shape(records, entry_bytes, seed);
  uint8_t* data = records.mutable_data();
  const auto num_records = static_cast<size_t>(records.shape(0));
  py::gil_scoped_release released;
  return invalidate_bad_records(data, num_records, shape);
}

size_t drop_bad_entries_checked(ByteArray buckets, uint32_t order_index, const ByteArray& records, size_t num_placed,
                                py::ssize_t entry_bytes, uint32_t loaded_start) {
  const RecordShape shape = record_shape(records, entry_bytes, 0);
  const size_t size = num_buckets(buckets);
  auto* index = reinterpret_cast<IndexBucket*>(buckets.mutable_data());
  const uint8_t* data = records.data();
  const auto num_loaded = static_cast<size_t>(records.shape(0));
  py::gil_scoped_release released;
  return drop_bad_entries(data, loaded_start, num_loaded, num_placed, shape, order_index, index, size);
}

}  // namespace

void bind_placed(py::module_& module) {
  module.def("index_entries", &index_entries_checked, py::arg("keys"), py::arg("record_numbers"),
             py::arg("buckets").noconvert());
  module.def("find_entries", &find_entries_checked, py::arg("buckets").noconvert(), py::arg("keys"));
  module.def("seal_records", &seal_records_checked, py::arg("records").noconvert(), py::arg("keys"),
             py::arg("order_index"), py::arg("entry_bytes"), py::arg("seed"));
  module.def("invalidate_bad_records", &invalidate_bad_records_checked, py::arg("records").noconvert(),
             py::arg("entry_bytes"), py::arg("seed"));
  module.def("drop_bad_entries", &drop_bad_entries_checked, py::arg("buckets").noconvert(), py::arg("order_index"),
             py::arg("records").noconvert(), py::arg("num_placed"), py::arg("entry_bytes"),
             py::arg("loaded_start") = 0);
}

}  // namespace tierstore
