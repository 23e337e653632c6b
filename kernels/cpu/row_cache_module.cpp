#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <utility>

#include "arrays.h"
#include "modules.h"
#include "row_cache.h"

namespace py = pybind11;

namespace tierstore {
namespace {

constexpr auto kRowIds = "row_ids must be [R]";

py::array_t<uint32_t> missing_of(const std::vector<uint32_t>& numbers) {
  return py::array_t<uint32_t>(static_cast<py::ssize_t>(numbers.size()), numbers.data());
}

// The gradients of one step, their distinct rows, and scratch. Memory is kept from step to step.
class PyRowUpdate {
 public:
  explicit PyRowUpdate(size_t scratch_bytes) { scratch_.resize(scratch_bytes / sizeof(float)); }

  // Returns the place of the first reference that is wrong, -1 if all are right; and whether its group is.
  std::pair<py::ssize_t, bool> begin(const Input<int64_t>& row_ids, const Input<float>& gradients,
                                     std::optional<Input<int32_t>> groups, int64_t num_rows) {
    require(row_ids.ndim() == 1, kRowIds);
    require(gradients.ndim() == 2 && gradients.shape(0) == row_ids.shape(0), "gradients must be [R, dim]");
    require(!groups || has_shape(*groups, {row_ids.shape(0)}), "groups must be [R]");
    require(static_cast<size_t>(row_ids.shape(0)) < kReferencesMax, "too many row ids at once");
    end();
    held_ = py::make_tuple(static_cast<const py::object&>(gradients), groups ? py::object(*groups) : py::none());
    const auto dim = static_cast<size_t>(gradients.shape(1));
    gradients_ = Gradients{gradients.data(), dim, dim};
    const int64_t* ids = row_ids.data();
    const int32_t* group_of = groups ? groups->data() : nullptr;
    const auto n = static_cast<size_t>(row_ids.shape(0));
    const py::gil_scoped_release released;
    const BadReference bad = rows_.find(ids, group_of, n, num_rows);
    return {bad.place == kAllGood ? -1 : static_cast<py::ssize_t>(bad.place), bad.is_group};
  }

  // Returns the first distinct row whose sum is not finite, -1 if all are.
  py::ssize_t find_not_finite() {
    const py::gil_scoped_release released;
    const size_t each = std::max<size_t>(1, scratch_.size() / gradients_.dim);
    for (size_t start = 0; start < rows_.count(); start += each) {
      const size_t until = std::min(rows_.count(), start + each);
      const size_t bad = sum_gradients(rows_, gradients_, start, until, scratch_.data());
      if (bad != kAllFinite) return static_cast<py::ssize_t>(bad);
    }
    return -1;
  }

  py::array_t<int64_t> row_ids() const {
    return py::array_t<int64_t>(static_cast<py::ssize_t>(rows_.count()), rows_.row_ids());
  }
  size_t count() const { return rows_.count(); }
  void end() { held_ = py::tuple(); }

  DistinctRows& rows() { return rows_; }
  const Gradients& gradients() const { return gradients_; }
  std::vector<float>& scratch() { return scratch_; }

 private:
  DistinctRows rows_;
  Gradients gradients_{};
  std::vector<float> scratch_;
  py::tuple held_;  // the caller's arrays
};

// Keeps the cache alive.
class PyRowPins {
 public:
  explicit PyRowPins(std::shared_ptr<RowCache> cache) : cache_(std::move(cache)), pins_(*cache_) {}
  void release() {
    const py::gil_scoped_release released;
    pins_.release();
  }
  size_t count() const { return pins_.count(); }
  RowPins* get() { return &pins_; }

 private:
  std::shared_ptr<RowCache> cache_;
  RowPins pins_;
};

class PyRowCache {
 public:
  PyRowCache(py::array block, const RowCacheShape& shape, const Optimizer& optimizer) : block_(std::move(block)) {
    require(block_.writeable() && static_cast<size_t>(block_.nbytes()) >= RowCacheLayout(shape).num_bytes,
            "the block is too small, or may not be written");
    uint8_t* memory = output_of<uint8_t>(block_, "the block must be contiguous uint8");
    require(reinterpret_cast<uintptr_t>(memory) % 64 == 0, "the block must be aligned to 64 bytes");
    cache_ = std::make_shared<RowCache>(memory, shape, optimizer);
  }

  py::array_t<uint32_t> gather(const Input<int64_t>& row_ids, py::array& out, size_t threads) {
    const auto n = row_ids.shape(0);
    require(row_ids.ndim() == 1, kRowIds);
    require(has_shape(out, {n, static_cast<py::ssize_t>(cache_->shape().dim)}), "out must be [R, dim]");
    float* values = output_of<float>(out, "out must be contiguous float32");
    const int64_t* ids = row_ids.data();
    std::vector<uint32_t> missing;
    {
      const py::gil_scoped_release released;
      require_rows(ids, n);
      cache_->gather(ids, static_cast<size_t>(n), values, missing, threads);
    }
    return missing_of(missing);
  }

  void bring_up_to_date(py::array& records, size_t threads) {
    const size_t n = require_records(records);
    uint8_t* bytes = output_of<uint8_t>(records, "records must be contiguous uint8");
    const py::gil_scoped_release released;
    cache_->bring_up_to_date(bytes, n, threads);
  }

  std::unique_ptr<PyRowPins> pins() const { return std::make_unique<PyRowPins>(cache_); }

  py::array_t<uint32_t> find(const Input<int64_t>& row_ids, PyRowPins* pins) {
    require(row_ids.ndim() == 1, kRowIds);
    const int64_t* ids = row_ids.data();
    std::vector<uint32_t> missing;
    {
      const py::gil_scoped_release released;
      require_rows(ids, row_ids.shape(0));
      cache_->find(ids, static_cast<size_t>(row_ids.shape(0)), missing, pins == nullptr ? nullptr : pins->get());
    }
    return missing_of(missing);
  }

  size_t put(const Input<int64_t>& row_ids, const Input<uint8_t>& records, PyRowPins* pins) {
    require(row_ids.ndim() == 1 && static_cast<size_t>(row_ids.shape(0)) == require_records(records), kRowIds);
    const int64_t* ids = row_ids.data();
    const uint8_t* bytes = records.data();
    const py::gil_scoped_release released;
    for (py::ssize_t i = 0; i < row_ids.shape(0); ++i) require(ids[i] >= 0, "row ids must not be negative");
    require_rows(ids, row_ids.shape(0));
    return cache_->put(ids, static_cast<size_t>(row_ids.shape(0)), bytes, pins == nullptr ? nullptr : pins->get());
  }

  py::tuple update(PyRowUpdate& update, size_t start, size_t end, double lr, size_t threads) {
    require(start <= end && end <= update.rows().count(), "start to end must be distinct rows of the update");
    require(update.rows().count() == 0 || update.gradients().dim == cache_->shape().dim, "gradients must be [R, dim]");
    std::vector<uint32_t> missing;
    UpdateOutcome outcome{};
    {
      const py::gil_scoped_release released;
      outcome = cache_->update(update.rows(), start, end, update.gradients(), lr, update.scratch(), threads, missing);
    }
    constexpr const char* kNames[] = {"done", "missing", "no_room_aside", "not_finite"};
    return py::make_tuple(kNames[outcome.what], outcome.count);
  }

  size_t drain(py::array& out, py::array& row_ids, uint32_t write) {
    require(out.ndim() == 2 && out.shape(1) >= static_cast<py::ssize_t>(cache_->shape().record_bytes) &&
                has_shape(row_ids, {out.shape(0)}),
            "out must be [n, record_bytes at least], row_ids [n]");
    uint8_t* bytes = output_of<uint8_t>(out, "out must be contiguous uint8");
    int64_t* ids = output_of<int64_t>(row_ids, "row_ids must be contiguous int64");
    const auto n = static_cast<size_t>(out.shape(0)), stride = static_cast<size_t>(out.shape(1));
    const py::gil_scoped_release released;
    size_t done = 0;
    for (size_t found = 1; done < n && found > 0; done += found) {  // whoever waits for the cache gets it in between
      found = cache_->drain(bytes + done * stride, stride, ids + done, std::min(kDrainedRows, n - done), write);
    }
    return done;
  }

  void written(const Input<int64_t>& row_ids, uint32_t write) {
    require(row_ids.ndim() == 1, kRowIds);
    const int64_t* ids = row_ids.data();
    const py::gil_scoped_release released;
    require_rows(ids, row_ids.shape(0));
    const auto n = static_cast<size_t>(row_ids.shape(0));
    for (size_t done = 0; done < n; done += kDrainedRows) {
      cache_->written(ids + done, std::min(kDrainedRows, n - done), write);
    }
  }

  void freeze() { cache_->freeze(); }
  void thaw() { cache_->thaw(); }
  size_t shrink(size_t num_slots) {
    require(!cache_->shape().is_direct() && num_slots > 0, "a cache of every row cannot shrink, nor one to nothing");
    const py::gil_scoped_release released;
    return cache_->shrink(num_slots);
  }
  void clear() {
    const py::gil_scoped_release released;
    cache_->clear();
  }
  uint32_t num_steps() const { return cache_->num_steps(); }
  void set_steps(uint32_t num_steps, const Input<double>& rates) {
    require(num_steps <= kStepMax && (rates.size() == 0 || has_shape(rates, {py::ssize_t{num_steps}})),
            "rates must be [num_steps]");
    std::vector<double> all(num_steps);
    if (rates.size() > 0) all.assign(rates.data(), rates.data() + num_steps);
    cache_->set_steps(num_steps, all.data());
  }
  py::array_t<double> rates() const {
    const std::vector<double> all = cache_->rates();
    return py::array_t<double>(static_cast<py::ssize_t>(all.size()), all.data());
  }
  py::dict counters() const {
    const RowCacheCounters now = cache_->counters();
    py::dict found;
    found["hits"] = now.hits;
    found["misses"] = now.misses;
    found["evicted"] = now.evicted;
    found["put_aside"] = now.put_aside;
    found["num_rows"] = now.num_rows;
    found["num_dirty"] = now.num_dirty;
    found["num_writing"] = now.num_writing;
    found["num_pinned"] = now.num_pinned;
    found["num_free"] = now.num_free;
    found["num_takeable"] = now.num_takeable;
    found["num_slots"] = now.num_slots;
    return found;
  }

 private:
  static constexpr size_t kDrainedRows = 1024;  // under one hold of the cache's mutex

  void require_rows(const int64_t* ids, py::ssize_t n) const {
    bool good = true;
    for (py::ssize_t i = 0; i < n; ++i) good &= ids[i] >= kNoRow && ids[i] < cache_->shape().num_rows;
    require(good, "a row id lies outside the table");
  }
  size_t require_records(const py::array& records) const {
    require(records.ndim() == 2 && records.shape(1) == static_cast<py::ssize_t>(cache_->shape().record_bytes),
            "records must be [R, record_bytes]");
    return static_cast<size_t>(records.shape(0));
  }

  py::array block_;
  std::shared_ptr<RowCache> cache_;
};

size_t row_cache_bytes(int64_t num_rows, size_t dim, size_t record_bytes, size_t num_slots, size_t num_aside) {
  return RowCacheLayout({num_rows, dim, record_bytes, num_slots, num_aside}).num_bytes;
}

std::unique_ptr<PyRowCache> new_row_cache(py::array block, int64_t num_rows, size_t dim, size_t record_bytes,
                                          size_t num_slots, size_t num_aside, const Optimizer& optimizer) {
  require(num_rows > 0 && dim > 0 && record_bytes % 16 == 0 && num_slots > 0 && num_slots <= RowCache::kSlotsMax,
          "rows, dim and slots must be at least 1, and records a multiple of 16 bytes");
  require((dim + state_floats(optimizer.rule, dim)) * sizeof(float) <= record_bytes,
          "a record has no room for its values and its state");
  const RowCacheShape shape{num_rows, dim, record_bytes, num_slots, num_aside};
  return std::make_unique<PyRowCache>(std::move(block), shape, optimizer);
}

}  // namespace

void bind_row_cache(py::module_& module) {
  py::class_<PyRowUpdate>(module, "RowUpdate")
      .def(py::init<size_t>(), py::arg("scratch_bytes"))
      .def("begin", &PyRowUpdate::begin, py::arg("row_ids"), py::arg("gradients"), py::arg("groups"),
           py::arg("num_rows"))
      .def("find_not_finite", &PyRowUpdate::find_not_finite)
      .def("end", &PyRowUpdate::end)
      .def_property_readonly("row_ids", &PyRowUpdate::row_ids)
      .def("__len__", &PyRowUpdate::count);
  module.def("row_cache_bytes", &row_cache_bytes, py::arg("num_rows"), py::arg("dim"), py::arg("record_bytes"),
             py::arg("num_slots"), py::arg("num_aside"));
  py::class_<PyRowPins>(module, "RowPins").def("release", &PyRowPins::release).def("__len__", &PyRowPins::count);
  py::class_<PyRowCache>(module, "RowCache")
      .def(py::init(&new_row_cache), py::arg("block"), py::arg("num_rows"), py::arg("dim"), py::arg("record_bytes"),
           py::arg("num_slots"), py::arg("num_aside"), py::arg("optimizer"))
      .def("gather", &PyRowCache::gather, py::arg("row_ids"), py::arg("out"), py::arg("threads") = 1)
      .def("bring_up_to_date", &PyRowCache::bring_up_to_date, py::arg("records"), py::arg("threads") = 1)
      .def("pins", &PyRowCache::pins, py::keep_alive<0, 1>())
      .def("find", &PyRowCache::find, py::arg("row_ids"), py::arg("pins") = nullptr)
      .def("put", &PyRowCache::put, py::arg("row_ids"), py::arg("records"), py::arg("pins") = nullptr)
      .def("update", &PyRowCache::update, py::arg("update"), py::arg("start"), py::arg("end"), py::arg("lr"),
           py::arg("threads") = 1)
      .def("drain", &PyRowCache::drain, py::arg("out"), py::arg("row_ids"), py::arg("write"))
      .def("written", &PyRowCache::written, py::arg("row_ids"), py::arg("write"))
      .def("freeze", &PyRowCache::freeze)
      .def("thaw", &PyRowCache::thaw)
      .def("shrink", &PyRowCache::shrink, py::arg("num_slots"))
      .def("clear", &PyRowCache::clear)
      .def_property_readonly("num_steps", &PyRowCache::num_steps)
      .def("set_steps", &PyRowCache::set_steps, py::arg("num_steps"), py::arg("rates"))
      .def("rates", &PyRowCache::rates)
      .def("counters", &PyRowCache::counters);
}

}  // namespace tierstore
