#include <pybind11/stl.h>

#include <optional>
#include <utility>
#include <vector>

#include "arrays.h"
#include "gradient_sums.h"
#include "modules.h"
#include "optimizer.h"
#include "shared_rows.h"

namespace py = pybind11;

namespace tierstore {
namespace {

constexpr size_t kCaughtUpRows = 4;  // a range of rows: some 10 us each, if a few steps were missed

using Floats = Input<float>;
using Groups = std::optional<Input<int32_t>>;

Rule rule_named(const std::string& name) {
  if (name == "sgd") return Rule::kSgd;
  if (name == "row_wise_adagrad") return Rule::kRowWiseAdagrad;
  if (name == "lazy_adam") return Rule::kLazyAdam;
  if (name == "dense_adam") return Rule::kDenseAdam;
  throw std::invalid_argument("rule must be sgd, row_wise_adagrad, lazy_adam or dense_adam, not " + name);
}

py::array_t<float> initial_state_of(const Optimizer& optimizer, size_t dim) {
  py::array_t<float> state(static_cast<py::ssize_t>(state_floats(optimizer.rule, dim)));
  initial_state(optimizer, dim, state.mutable_data());
  return state;
}

void restart_history(StepHistory& history, uint32_t last, const std::optional<Input<double>>& rates) {
  require(rates || last == 0 || history.optimizer().rule != Rule::kDenseAdam,
          "dense_adam needs the rates of all steps");
  require(!rates || (rates->ndim() == 1 && rates->size() == static_cast<py::ssize_t>(last)), "rates must be [last]");
  history.restart(last, rates ? rates->data() : nullptr);
}

// Where the records of an array begin: all of its rows, or those that are named.
struct RecordArray {
  RecordArray(py::array& records, const Optimizer& optimizer, size_t dim) {
    first = output_of<float>(records, "records must be contiguous float32");
    require(records.ndim() == 2 && dim > 0, "records must be [rows, floats], and dim positive");
    count = static_cast<size_t>(records.shape(0));
    stride = static_cast<size_t>(records.shape(1));
    require(stride >= dim + state_floats(optimizer.rule, dim), "a record must hold dim values and the rule's state");
  }
  std::vector<float*> all() const {
    std::vector<float*> found(count);
    for (size_t i = 0; i < count; ++i) found[i] = first + i * stride;
    return found;
  }
  float* first;
  size_t count, stride;
};

void update_records(const StepHistory& history, py::ssize_t dim, py::array& records, const Floats& sums, float scale,
                    bool plain) {
  require(history.last() > 0, "the history has no step yet: append its rate first");
  const RecordArray found(records, history.optimizer(), static_cast<size_t>(dim));
  require(has_shape(sums, {records.shape(0), dim}), "sums must be [rows, dim]");
  std::vector<const float*> gradients(found.count);
  for (size_t i = 0; i < found.count; ++i) gradients[i] = sums.data() + i * static_cast<size_t>(dim);
  const std::vector<float*> rows = found.all();
  const Steps steps = history.steps();
  const py::gil_scoped_release released;
  update_rows(history.optimizer(), steps, static_cast<size_t>(dim), found.count, rows.data(), gradients.data(), scale,
              plain);
}

void catch_up(const StepHistory& history, py::ssize_t dim, py::array& records, size_t threads, bool plain) {
  const RecordArray found(records, history.optimizer(), static_cast<size_t>(dim));
  const std::vector<float*> rows = found.all();
  const Steps steps = history.steps();
  const py::gil_scoped_release released;
  share_rows(found.count, kCaughtUpRows, threads, [&](size_t start, size_t end) {
    catch_up_rows(history.optimizer(), steps, static_cast<size_t>(dim), end - start, rows.data() + start, plain);
  });
}

struct ReferenceBatch {
  ReferenceBatch(const Input<int64_t>& row_ids, const Groups& groups, int64_t num_rows) {
    require(row_ids.ndim() == 1, "row_ids must be [references]");
    require(!groups || has_shape(*groups, {row_ids.shape(0)}), "groups must be [references]");
    BadReference bad{};
    {
      const int64_t* ids = row_ids.data();
      const int32_t* of = groups ? groups->data() : nullptr;
      const auto count = static_cast<size_t>(row_ids.shape(0));
      const py::gil_scoped_release released;
      bad = rows.find(ids, of, count, num_rows);
    }
    if (bad.place == kAllGood) return;
    const auto place = static_cast<py::ssize_t>(bad.place);
    if (bad.is_group) throw std::invalid_argument("groups[" + std::to_string(place) + "] is negative");
    throw std::invalid_argument("row_ids[" + std::to_string(place) + "] is " + std::to_string(row_ids.data()[place]) +
                                ", must be -1 or at least 0 and below " + std::to_string(num_rows));
  }
  DistinctRows rows;
};

Gradients gradients_of(const Floats& gradients, const Input<int64_t>& row_ids, float scale) {
  require(gradients.ndim() == 2 && gradients.shape(0) == row_ids.shape(0) && gradients.shape(1) > 0,
          "gradients must be [references, dim]");
  const auto dim = static_cast<size_t>(gradients.shape(1));
  return {gradients.data(), dim, dim, scale};
}

template <typename T>
py::array_t<T> array_of(const T* values, size_t count) {
  return py::array_t<T>(static_cast<py::ssize_t>(count), values);
}

py::tuple find_distinct(const Input<int64_t>& row_ids, int64_t num_rows, const Groups& groups) {
  const ReferenceBatch batch(row_ids, groups, num_rows);
  const DistinctRows& rows = batch.rows;
  auto places = array_of(rows.places(), rows.starts()[rows.count()]);
  uint32_t* place = places.mutable_data();
  for (py::ssize_t i = 0; i < places.size(); ++i) place[i] &= ~DistinctRows::kNewGroup;
  return py::make_tuple(array_of(rows.row_ids(), rows.count()), array_of(rows.starts(), rows.count() + 1), places,
                        array_of(rows.repeated_before(), rows.count() + 1));
}

py::tuple sum_batch(const Input<int64_t>& row_ids, const Floats& gradients, int64_t num_rows, const Groups& groups,
                    float scale, bool plain) {
  const Gradients given = gradients_of(gradients, row_ids, scale);
  const ReferenceBatch batch(row_ids, groups, num_rows);
  py::array_t<float> sums({static_cast<py::ssize_t>(batch.rows.count()), gradients.shape(1)});
  float* out = sums.mutable_data();
  size_t bad;
  {
    const py::gil_scoped_release released;
    bad = sum_gradients(batch.rows, given, 0, batch.rows.count(), out, plain);
  }
  return py::make_tuple(array_of(batch.rows.row_ids(), batch.rows.count()), sums,
                        bad == kAllFinite ? -1 : static_cast<py::ssize_t>(bad));
}

int64_t apply_batch(const StepHistory& history, const Input<int64_t>& row_ids, const Floats& gradients,
                    py::array& records, const Groups& groups, float scale, size_t scratch_floats, size_t threads,
                    bool plain) {
  require(history.last() > 0, "the history has no step yet: append its rate first");
  const Gradients given = gradients_of(gradients, row_ids, scale);
  const RecordArray found(records, history.optimizer(), given.dim);
  const ReferenceBatch batch(row_ids, groups, static_cast<int64_t>(found.count));
  const Steps steps = history.steps();
  const py::gil_scoped_release released;
  std::vector<float*> rows(batch.rows.count());
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = found.first + static_cast<size_t>(batch.rows.row_ids()[i]) * found.stride;
  }
  const size_t most = batch.rows.repeated_before()[rows.size()] * given.dim;
  const size_t floats = std::max(std::min(most, scratch_floats), given.dim);
  const std::unique_ptr<float[]> scratch(new float[floats]);
  const size_t bad = apply_gradients(history.optimizer(), steps, batch.rows, given, rows.data(), scratch.get(), floats,
                                     threads, plain);
  return bad == kAllFinite ? kNoRow : batch.rows.row_ids()[bad];
}

void bind_optimizer_classes(py::module_& module) {
  py::class_<Optimizer>(module, "Optimizer")
      .def(py::init([](const std::string& rule, double lr, double eps, double beta1, double beta2, double decay,
                       double initial) { return Optimizer{rule_named(rule), lr, eps, beta1, beta2, decay, initial}; }),
           py::arg("rule"), py::arg("lr") = 0.0, py::arg("eps") = 0.0, py::arg("beta1") = 0.0, py::arg("beta2") = 0.0,
           py::arg("decay") = 1.0, py::arg("initial") = 0.0)
      .def(
          "state_floats", [](const Optimizer& self, size_t dim) { return state_floats(self.rule, dim); },
          py::arg("dim"))
      .def("initial_state", &initial_state_of, py::arg("dim"));
  py::class_<StepHistory>(module, "StepHistory")
      .def(py::init<const Optimizer&>(), py::arg("optimizer"))
      .def("append", &StepHistory::append, py::arg("lr"))
      .def("restart", &restart_history, py::arg("last"), py::arg("rates") = py::none())
      .def_property_readonly("last", &StepHistory::last)
      .def_property_readonly("num_bytes", &StepHistory::bytes);
}

}  // namespace

void bind_optimizer(py::module_& module) {
  bind_optimizer_classes(module);
  module.def("update_rows", &update_records, py::arg("history"), py::arg("dim"), py::arg("records"), py::arg("sums"),
             py::arg("scale") = 1.0f, py::arg("plain") = false);
  module.def("catch_up_rows", &catch_up, py::arg("history"), py::arg("dim"), py::arg("records"), py::arg("threads") = 1,
             py::arg("plain") = false);
  module.def("distinct_rows", &find_distinct, py::arg("row_ids"), py::arg("num_rows"), py::arg("groups") = py::none());
  module.def("sum_gradients", &sum_batch, py::arg("row_ids"), py::arg("gradients"), py::arg("num_rows"),
             py::arg("groups") = py::none(), py::arg("scale") = 1.0f, py::arg("plain") = false);
  module.def("apply_gradients", &apply_batch, py::arg("history"), py::arg("row_ids"), py::arg("gradients"),
             py::arg("records"), py::arg("groups") = py::none(), py::arg("scale") = 1.0f,
             py::arg("scratch_floats") = size_t{1} << 24, py::arg("threads") = 1, py::arg("plain") = false);
}

}  // namespace tierstore
