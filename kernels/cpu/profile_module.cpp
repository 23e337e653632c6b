// The Python face of the kernels of profiles and predictions: argument checks, then the work with the interpreter lock
// released. kernels/__init__.py says what each promises.
#include "profile_module.h"

#include "arrays.h"
#include "simulate.h"
#include "stack_distances.h"

namespace py = pybind11;

namespace tierstore {
namespace {

py::array_t<bool> simulate_cache_checked(const Input<uint8_t>& order_index, const Input<int64_t>& keys,
                                         const Input<int64_t>& batch_ends, int64_t num_sets) {
  require(keys.ndim() == 1 && has_shape(order_index, {keys.size()}), "order_index and keys must be [accesses]");
  require(batch_ends.ndim() == 1 && num_sets > 0, "batch_ends must be [batches], num_sets at least 1");
  const Accesses accesses{order_index.data(), keys.data(), batch_ends.data(), static_cast<size_t>(batch_ends.size())};
  py::array_t<bool> hits(keys.size());
  bool* out = hits.mutable_data();
  const int64_t num_accesses = keys.size();
  {
    py::gil_scoped_release released;
    int64_t start = 0;
    for (size_t batch = 0; batch < accesses.num_batches; ++batch) {
      require(accesses.batch_ends[batch] >= start, "batch_ends must ascend, the last being the number of accesses");
      start = accesses.batch_ends[batch];
    }
    require(start == num_accesses, "batch_ends must ascend, the last being the number of accesses");
    for (int64_t i = 0; i < num_accesses; ++i) {
      require(accesses.order_index[i] < kSimulatedOrdersMax && accesses.keys[i] >= -1,
              "order_index must be 0 to 15, keys not below -1");
    }
    simulate_cache(accesses, static_cast<size_t>(num_sets), out);
  }
  return hits;
}

py::array_t<int64_t> stack_distances_checked(const Input<int64_t>& items) {
  require(items.ndim() == 1, "items must be [accesses]");
  const int64_t* ids = items.data();
  const int64_t num_accesses = items.size();
  py::array_t<int64_t> distances(num_accesses);
  int64_t* out = distances.mutable_data();
  {
    py::gil_scoped_release released;
    for (int64_t i = 0; i < num_accesses; ++i) {
      require(ids[i] >= 0 && ids[i] < num_accesses, "items must be dense: 0 to accesses - 1");
    }
    stack_distances(ids, static_cast<size_t>(num_accesses), out);
  }
  return distances;
}

}  // namespace

void bind_profile(py::module_& module) {
  module.def("simulate_cache", &simulate_cache_checked, py::arg("order_index"), py::arg("keys"), py::arg("batch_ends"),
             py::arg("num_sets"));
  module.def("stack_distances", &stack_distances_checked, py::arg("items"));
}

}  // namespace tierstore
