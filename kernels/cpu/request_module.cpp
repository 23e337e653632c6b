#include "request_module.h"

#include <algorithm>
#include <limits>
#include <utility>

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

bool is_strided_bytes(py::handle object) {
  if (!py::isinstance<py::array>(object)) return false;
  const auto array = py::reinterpret_borrow<py::array>(object);
  return array.dtype().kind() == 'u' && array.dtype().itemsize() == 1 && array.writeable();
}

// Where the rows of an array of two or three dimensions lie.
RowsOut strided(py::array& rows) {
  const py::ssize_t last = rows.ndim() - 1;
  RowsOut out(static_cast<uint8_t*>(rows.mutable_data()));
  if ((rows.flags() & py::array::c_style) != 0) return out;
  out.byte_stride = rows.strides(last);
  out.inner_stride = rows.strides(last - 1);
  out.num_inner = static_cast<size_t>(rows.shape(last - 1));
  out.outer_stride = last == 2 ? rows.strides(0) : 0;
  return out;
}

// The bytes from the first to the last of an array.
std::pair<uint8_t*, size_t> extent(py::array& rows) {
  auto* start = static_cast<uint8_t*>(rows.mutable_data());
  if (rows.size() == 0) return {start, 0};
  ptrdiff_t before = 0, after = 0;
  for (py::ssize_t axis = 0; axis < rows.ndim(); ++axis) {
    const ptrdiff_t reach = (rows.shape(axis) - 1) * rows.strides(axis);
    (reach < 0 ? before : after) += reach;
  }
  return {start + before, static_cast<size_t>(after - before) + 1};
}

bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
  const auto a_start = reinterpret_cast<uintptr_t>(a), b_start = reinterpret_cast<uintptr_t>(b);
  return a_start < b_start + b_bytes && b_start < a_start + a_bytes;
}

bool has_rows(const std::vector<Table>& tables, size_t index) {
  return index < tables.size() && (tables[index].cache != nullptr || tables[index].resident != nullptr);
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

void TableRequest::take(size_t table, py::handle keys, py::handle output) {
  const auto key_array = py::reinterpret_borrow<py::array>(keys);
  auto out_array = py::reinterpret_borrow<py::array>(output);
  index = table;
  list.keys = static_cast<const int64_t*>(key_array.data());
  list.count = static_cast<size_t>(key_array.size());
  out.rows = static_cast<uint8_t*>(out_array.mutable_data());
  out_bytes = static_cast<size_t>(out_array.nbytes());
  out_object = std::move(out_array);
  keep_keys_from(out.rows, out_bytes);
}

bool TableRequest::fill_lookup(const std::vector<Table>& tables, size_t table, py::handle keys, py::handle rows,
                               py::handle sources) {
  if (!has_rows(tables, table) || !is_keys(keys) || !is_bytes(rows)) return false;
  const Table& of = tables[table];
  const auto k = py::reinterpret_borrow<py::array>(keys), o = py::reinterpret_borrow<py::array>(rows);
  if (k.ndim() != 2 || o.ndim() != 3 || k.shape(1) != static_cast<py::ssize_t>(of.num_orders) ||
      k.size() > std::numeric_limits<uint32_t>::max() || o.shape(0) != k.shape(0) ||
      o.shape(1) != static_cast<py::ssize_t>(of.num_heads()) || o.shape(2) != static_cast<py::ssize_t>(of.row_bytes)) {
    return false;
  }
  take(table, keys, rows);
  if (!sources) return true;
  if (!is_bytes(sources)) return false;
  auto s = py::reinterpret_borrow<py::array>(sources);
  if (s.ndim() != 2 || s.shape(0) != k.shape(0) || s.shape(1) != k.shape(1)) return false;
  out.sources = static_cast<uint8_t*>(s.mutable_data());
  keep_keys_from(out.sources, static_cast<size_t>(s.nbytes()));
  sources_object = std::move(s);
  return true;
}

bool TableRequest::fill_pairs(const std::vector<Table>& tables, size_t table, py::handle keys, py::handle pairs,
                              py::handle entries) {
  if (!has_rows(tables, table) || !is_keys(keys) || !is_array(pairs, 'i', 4, false) || !is_bytes(entries)) return false;
  const auto k = py::reinterpret_borrow<py::array>(keys), p = py::reinterpret_borrow<py::array>(pairs);
  const auto o = py::reinterpret_borrow<py::array>(entries);
  if (k.ndim() != 1 || p.ndim() != 1 || p.size() != k.size() || k.size() > std::numeric_limits<uint32_t>::max() ||
      o.ndim() != 2 || o.shape(0) != k.size() || o.shape(1) != static_cast<py::ssize_t>(tables[table].entry_bytes())) {
    return false;
  }
  list.pairs = static_cast<const int32_t*>(p.data());
  take(table, keys, entries);
  return true;
}

bool TableRequest::fill_rows(const std::vector<Table>& tables, size_t table, py::handle row_ids, py::handle rows,
                             const RowRange& wanted) {
  if (!has_rows(tables, table) || !is_keys(row_ids) || !is_strided_bytes(rows)) return false;
  const Table& of = tables[table];
  const auto ids = py::reinterpret_borrow<py::array>(row_ids);
  auto to = py::reinterpret_borrow<py::array>(rows);
  const py::ssize_t ndim = ids.ndim();
  if (ndim < 1 || ndim > 2 || to.ndim() != ndim + 1 || to.shape(ndim) != static_cast<py::ssize_t>(of.row_bytes) ||
      !std::equal(ids.shape(), ids.shape() + ndim, to.shape()) || ids.size() > std::numeric_limits<uint32_t>::max()) {
    return false;
  }
  index = table;
  by_row_id = true;
  of_tokens = of.is_plain || (ndim == 2 && ids.shape(1) == static_cast<py::ssize_t>(of.num_heads()));
  list.keys = static_cast<const int64_t*>(ids.data());
  list.count = static_cast<size_t>(ids.size());
  rows_out = strided(to);
  rows_out.wanted = wanted;
  const auto [start, num_bytes] = extent(to);
  out = Output(start);
  out_bytes = num_bytes;
  out_object = std::move(to);
  keep_keys_from(start, num_bytes);
  return true;
}

bool TableRequest::fill_locate(const std::vector<Table>& tables, size_t table, py::handle keys, py::handle sources) {
  if (!has_rows(tables, table) || !is_keys(keys) || !is_bytes(sources)) return false;
  const auto k = py::reinterpret_borrow<py::array>(keys);
  if (k.ndim() != 2 || k.shape(1) != static_cast<py::ssize_t>(tables[table].num_orders) ||
      py::reinterpret_borrow<py::array>(sources).nbytes() != k.size()) {
    return false;
  }
  take(table, keys, sources);
  return true;
}

}  // namespace tierstore
