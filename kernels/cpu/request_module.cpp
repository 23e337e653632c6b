#include "request_module.h"

#include <limits>

namespace py = pybind11;

namespace tierstore {
namespace {

bool is_array(py::handle object, char kind, py::ssize_t itemsize, bool writeable) {
  if (!py::isinstance<py::array>(object)) return false;
  const auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  const char order = dtype.byteorder();
  return dtype.kind() == kind && dtype.itemsize() == itemsize && (order == '=' || order == '|') &&
         py::detail::check_flags(object.ptr(), py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_) &&
         (!writeable || array.writeable());
}

bool is_keys(py::handle object) { return is_array(object, 'i', 8, false); }
bool is_bytes(py::handle object) { return is_array(object, 'u', 1, true); }

bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
  const auto a_start = reinterpret_cast<uintptr_t>(a), b_start = reinterpret_cast<uintptr_t>(b);
  return a_start < b_start + b_bytes && b_start < a_start + a_bytes;
}

bool has_rows(const std::vector<Table>& tables, size_t index) {
  return index < tables.size() && (tables[index].cache != nullptr || tables[index].resident != nullptr);
}

TableRequest request_of(size_t index, py::handle keys, py::handle out) {
  const auto key_array = py::reinterpret_borrow<py::array>(keys);
  auto out_array = py::reinterpret_borrow<py::array>(out);
  TableRequest request{index,
                       {static_cast<const int64_t*>(key_array.data()), static_cast<size_t>(key_array.size())},
                       static_cast<uint8_t*>(out_array.mutable_data()),
                       static_cast<size_t>(out_array.nbytes()),
                       out_array,
                       {},
                       false,
                       false,
                       {},
                       {}};
  request.keep_keys_from(request.out.rows, request.out_bytes);
  return request;
}

}  // namespace

void TableRequest::keep_keys_from(const void* output, size_t num_bytes) {
  if (own_keys.empty() && overlap(list.keys, list.count * sizeof(int64_t), output, num_bytes)) {
    own_keys.assign(list.keys, list.keys + list.count);
    list.keys = own_keys.data();
  }
  if (own_pairs.empty() && list.pairs != nullptr &&
      overlap(list.pairs, list.count * sizeof(int32_t), output, num_bytes)) {
    own_pairs.assign(list.pairs, list.pairs + list.count);
    list.pairs = own_pairs.data();
  }
}

std::optional<TableRequest> lookup_request(const std::vector<Table>& tables, size_t index, py::handle keys,
                                           py::handle out, py::handle sources) {
  if (!has_rows(tables, index) || !is_keys(keys) || !is_bytes(out)) return std::nullopt;
  const Table& table = tables[index];
  const auto k = py::reinterpret_borrow<py::array>(keys), o = py::reinterpret_borrow<py::array>(out);
  if (k.ndim() != 2 || o.ndim() != 3 || k.shape(1) != static_cast<py::ssize_t>(table.num_orders) ||
      k.size() > std::numeric_limits<uint32_t>::max() || o.shape(0) != k.shape(0) ||
      o.shape(1) != static_cast<py::ssize_t>(table.num_heads()) ||
      o.shape(2) != static_cast<py::ssize_t>(table.row_bytes)) {
    return std::nullopt;
  }
  TableRequest request = request_of(index, keys, out);
  if (sources.is_none()) return request;
  if (!is_bytes(sources)) return std::nullopt;
  auto s = py::reinterpret_borrow<py::array>(sources);
  if (s.ndim() != 2 || s.shape(0) != k.shape(0) || s.shape(1) != k.shape(1)) return std::nullopt;
  request.out.sources = static_cast<uint8_t*>(s.mutable_data());
  request.sources_object = s;
  request.keep_keys_from(request.out.sources, static_cast<size_t>(s.nbytes()));
  return request;
}

std::optional<TableRequest> pairs_request(const std::vector<Table>& tables, size_t index, py::handle keys,
                                          py::handle pairs, py::handle out) {
  if (!has_rows(tables, index) || !is_keys(keys) || !is_array(pairs, 'i', 4, false) || !is_bytes(out))
    return std::nullopt;
  const auto k = py::reinterpret_borrow<py::array>(keys), p = py::reinterpret_borrow<py::array>(pairs);
  const auto o = py::reinterpret_borrow<py::array>(out);
  if (k.ndim() != 1 || p.ndim() != 1 || p.size() != k.size() || k.size() > std::numeric_limits<uint32_t>::max() ||
      o.ndim() != 2 || o.shape(0) != k.size() || o.shape(1) != static_cast<py::ssize_t>(tables[index].entry_bytes())) {
    return std::nullopt;
  }
  TableRequest request = request_of(index, keys, out);
  request.list.pairs = static_cast<const int32_t*>(p.data());
  request.keep_keys_from(request.out.rows, request.out_bytes);
  return request;
}

std::optional<TableRequest> rows_request(const std::vector<Table>& tables, size_t index, py::handle row_ids,
                                         py::handle out) {
  if (index >= tables.size() || !is_keys(row_ids) || !is_bytes(out)) return std::nullopt;
  const auto ids = py::reinterpret_borrow<py::array>(row_ids);
  const auto count = static_cast<size_t>(ids.size());
  if (static_cast<size_t>(py::reinterpret_borrow<py::array>(out).nbytes()) != count * tables[index].row_bytes ||
      count > std::numeric_limits<uint32_t>::max()) {
    return std::nullopt;
  }
  TableRequest request = request_of(index, row_ids, out);
  request.by_row_id = true;
  request.of_tokens = ids.ndim() == 2 && ids.shape(1) == static_cast<py::ssize_t>(tables[index].num_heads());
  return request;
}

std::optional<TableRequest> locate_request(const std::vector<Table>& tables, size_t index, py::handle keys,
                                           py::handle sources) {
  if (!has_rows(tables, index) || !is_keys(keys) || !is_bytes(sources)) return std::nullopt;
  const auto k = py::reinterpret_borrow<py::array>(keys);
  if (k.ndim() != 2 || k.shape(1) != static_cast<py::ssize_t>(tables[index].num_orders) ||
      py::reinterpret_borrow<py::array>(sources).nbytes() != k.size()) {
    return std::nullopt;
  }
  return request_of(index, keys, sources);
}

}  // namespace tierstore
