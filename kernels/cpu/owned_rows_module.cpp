#include <memory>
#include <optional>

#include "arrays.h"
#include "modules.h"
#include "owned_rows.h"

namespace py = pybind11;

namespace tierstore {
namespace {

std::unique_ptr<OwnedRows> find_owned(const Input<int64_t>& row_ids, const Input<int64_t>& starts,
                                      const std::optional<Input<int32_t>>& groups) {
  require(row_ids.ndim() == 1, "row_ids must be [references]");
  require(!groups || has_shape(*groups, {row_ids.shape(0)}), "groups must be [references]");
  require(starts.ndim() == 1 && starts.shape(0) > 1, "starts must be [owners + 1], of one owner at least");
  const auto num_owners = static_cast<size_t>(starts.shape(0)) - 1;
  const int64_t* first = starts.data();
  require(first[0] == 0, "starts must begin with 0");
  for (size_t owner = 0; owner < num_owners; ++owner) require(first[owner] <= first[owner + 1], "starts must ascend");
  const int64_t* ids = row_ids.data();
  const int32_t* of = groups ? groups->data() : nullptr;
  const auto count = static_cast<size_t>(row_ids.shape(0));
  const py::gil_scoped_release released;
  return std::make_unique<OwnedRows>(ids, of, count, first, num_owners);
}

py::array_t<int64_t> counts_of(const OwnedRows& owned) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(owned.counts().size()), owned.counts().data());
}

py::array_t<int64_t> row_ids_of(const OwnedRows& owned) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(owned.rows().count()), owned.rows().row_ids());
}

py::array_t<int64_t> sum_counts_of(const OwnedRows& owned) {
  const auto groups = static_cast<py::ssize_t>(owned.num_groups());
  return py::array_t<int64_t>({static_cast<py::ssize_t>(owned.counts().size()), groups}, owned.sum_counts().data());
}

py::array_t<int64_t> places_of(const OwnedRows& owned) {
  const DistinctRows& rows = owned.rows();
  py::array_t<int64_t> places(static_cast<py::ssize_t>(rows.num_references()));
  int64_t* place = places.mutable_data();
  for (size_t i = 0; i < rows.num_references(); ++i)
    place[i] = static_cast<int64_t>(rows.row_of()[i] == DistinctRows::kNone ? rows.count() : rows.row_of()[i]);
  return places;
}

py::array_t<uint32_t> rows_of_sums(const OwnedRows& owned) {
  const std::vector<uint32_t>& rows = owned.rows_of_sums();
  return py::array_t<uint32_t>(static_cast<py::ssize_t>(rows.size()), rows.data());
}

void expand(const OwnedRows& owned, const Input<uint8_t>& values, py::array& out, size_t threads) {
  const auto count = static_cast<py::ssize_t>(owned.rows().count());
  require(values.ndim() == 2 && values.shape(0) == count, "values must be [distinct rows, row_bytes]");
  require(has_shape(out, {static_cast<py::ssize_t>(owned.rows().num_references()), values.shape(1)}),
          "out must be [references, row_bytes]");
  auto* to = output_of<uint8_t>(out, "out must be contiguous uint8");
  const uint8_t* from = values.data();
  const auto row_bytes = static_cast<size_t>(values.shape(1));
  const py::gil_scoped_release released;
  owned.expand(from, row_bytes, to, threads);
}

void sum(const OwnedRows& owned, const Input<float>& gradients, py::array& out, float scale, size_t threads) {
  require(gradients.ndim() == 2 && gradients.shape(0) == static_cast<py::ssize_t>(owned.rows().num_references()) &&
              gradients.shape(1) > 0,
          "gradients must be [references, dim]");
  require(has_shape(out, {static_cast<py::ssize_t>(owned.num_sums()), gradients.shape(1)}), "out must be [sums, dim]");
  auto* to = output_of<float>(out, "out must be contiguous float32");
  const float* from = gradients.data();
  const auto dim = static_cast<size_t>(gradients.shape(1));
  const py::gil_scoped_release released;
  owned.sum(from, dim, scale, to, threads);
}

}  // namespace

void bind_owned_rows(py::module_& module) {
  py::class_<OwnedRows>(module, "OwnedRows")
      .def(py::init(&find_owned), py::arg("row_ids"), py::arg("starts"), py::arg("groups") = py::none())
      .def_property_readonly("row_ids", &row_ids_of)
      .def_property_readonly("counts", &counts_of)
      .def_property_readonly("places", &places_of)
      .def_property_readonly("sum_counts", &sum_counts_of)
      .def_property_readonly("rows_of_sums", &rows_of_sums)
      .def("expand", &expand, py::arg("values"), py::arg("out"), py::arg("threads") = 1)
      .def("sum", &sum, py::arg("gradients"), py::arg("out"), py::arg("scale") = 1.0f, py::arg("threads") = 1);
}

}  // namespace tierstore
