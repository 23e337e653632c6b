// The Python face of the kernels of profiles and predictions: argument checks, then the work with the interpreter lock
// released. kernels/_cpu.pyi says what each promises.
#include <pybind11/stl.h>

#include <optional>
#include <utility>

#include "arrays.h"
#include "items.h"
#include "modules.h"
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

bool is_items(const py::array& array) { return array.ndim() == 2 && array.shape(1) == 2; }

const Item* items_of(const Input<uint64_t>& array) { return reinterpret_cast<const Item*>(array.data()); }

Item* items_to(py::array& array, const char* what) { return reinterpret_cast<Item*>(output_of<uint64_t>(array, what)); }

void require_packing(int64_t order, int64_t bits) {
  require(bits >= 1 && bits <= 63 && order >= 1 && order <= 128 / bits, "bits must be 1 to 63, order * bits 1 to 128");
}

int64_t windows_of_tokens_checked(const Input<int64_t>& token_ids, const std::optional<Input<int32_t>>& token_map,
                                  int64_t vocab_size, int64_t pad_id, int64_t barrier_id, int64_t order_max,
                                  int64_t bits, py::array& out) {
  require(vocab_size > 0 && (!token_map || has_shape(*token_map, {vocab_size})),
          "vocab_size must be positive, token_map [vocab_size]");
  require_packing(order_max, bits);
  require(pad_id >= 0 && pad_id >> bits == 0, "pad_id must fit bits");
  require(token_ids.ndim() == 1 && has_shape(out, {token_ids.size(), 2}),
          "token_ids must be [tokens], out [tokens, 2]");
  const Windows shape{token_map ? token_map->data() : nullptr,
                      vocab_size,
                      pad_id,
                      barrier_id,
                      static_cast<unsigned>(order_max),
                      static_cast<unsigned>(bits)};
  const int64_t* ids = token_ids.data();
  const auto num_tokens = static_cast<size_t>(token_ids.size());
  Item* windows = items_to(out, "out must be contiguous uint64");
  py::gil_scoped_release released;
  const int64_t outside = windows_of_tokens(ids, num_tokens, shape, windows);
  require(outside != kIdTooWide, "every id, mapped, must fit bits");
  return outside;
}

void keys_of_windows_checked(const Input<uint64_t>& windows, int64_t order, int64_t bits,
                             const Input<int64_t>& multipliers, py::array& out) {
  require_packing(order, bits);
  require(is_items(windows) && has_shape(out, {windows.shape(0)}), "windows must be [windows, 2], out [windows]");
  require(multipliers.ndim() == 1 && multipliers.size() >= order, "there must be a multiplier for each id");
  const Item* ngrams = items_of(windows);
  const int64_t* factors = multipliers.data();
  const auto num_ngrams = static_cast<size_t>(windows.shape(0));
  int64_t* keys = output_of<int64_t>(out, "out must be contiguous int64");
  py::gil_scoped_release released;
  require(keys_of_windows(ngrams, num_ngrams, static_cast<unsigned>(order), static_cast<unsigned>(bits), factors, keys),
          "windows must be shifted to the order: below 2^(order * bits)");
}

void sort_items_checked(py::array& items, std::optional<py::array> weights) {
  require(is_items(items), "items must be [items, 2]");
  require(!weights || (weights->ndim() == 2 && weights->shape(0) == items.shape(0)),
          "weights must be [items, weights]");
  Item* in_place = items_to(items, "items must be contiguous uint64");
  int64_t* with_them = weights ? output_of<int64_t>(*weights, "weights must be contiguous int64") : nullptr;
  const auto num_items = static_cast<size_t>(items.shape(0));
  const auto num_weights = static_cast<size_t>(weights ? weights->shape(1) : 0);
  py::gil_scoped_release released;
  sort_items(in_place, num_items, with_them, num_weights);
}

std::pair<py::array, py::array> sum_items_checked(const Input<uint64_t>& items,
                                                  const std::optional<Input<int64_t>>& weights, int64_t shift) {
  require(is_items(items) && shift >= 0 && shift < 128, "items must be [items, 2], shift 0 to 127");
  require(!weights || (weights->ndim() == 2 && weights->shape(0) == items.shape(0)),
          "weights must be [items, weights]");
  const Item* given = items_of(items);
  const int64_t* factors = weights ? weights->data() : nullptr;
  const auto num_items = static_cast<size_t>(items.shape(0));
  const auto bits = static_cast<unsigned>(shift);
  size_t num_distinct = 0;
  {
    py::gil_scoped_release released;
    num_distinct = count_distinct(given, num_items, bits);
  }
  require(num_distinct != kNotSorted, "items must be sorted");
  const py::ssize_t num_weights = weights ? weights->shape(1) : 1;
  py::array_t<uint64_t> distinct({static_cast<py::ssize_t>(num_distinct), py::ssize_t{2}});
  py::array_t<int64_t> sums({static_cast<py::ssize_t>(num_distinct), num_weights});
  Item* distinct_to = items_to(distinct, "");
  int64_t* sums_to = sums.mutable_data();
  {
    py::gil_scoped_release released;
    sum_items(given, num_items, factors, static_cast<size_t>(num_weights), bits, distinct_to, sums_to);
  }
  return {std::move(distinct), std::move(sums)};
}

py::array_t<int64_t> find_items_checked(const Input<uint64_t>& haystack, const Input<uint64_t>& needles) {
  require(is_items(haystack) && is_items(needles), "haystack and needles must be [items, 2]");
  py::array_t<int64_t> places(needles.shape(0));
  const Item *in = items_of(haystack), *wanted = items_of(needles);
  const auto size = static_cast<size_t>(haystack.shape(0)), num_needles = static_cast<size_t>(needles.shape(0));
  int64_t* out = places.mutable_data();
  {
    py::gil_scoped_release released;
    require(count_distinct(in, size, 0) == size && count_distinct(wanted, num_needles, 0) != kNotSorted,
            "haystack must ascend strictly, needles ascend");
    find_items(in, size, wanted, num_needles, out);
  }
  return places;
}

}  // namespace

void bind_profile(py::module_& module) {
  module.def("simulate_cache", &simulate_cache_checked, py::arg("order_index"), py::arg("keys"), py::arg("batch_ends"),
             py::arg("num_sets"));
  module.def("stack_distances", &stack_distances_checked, py::arg("items"));
  module.def("windows_of_tokens", &windows_of_tokens_checked, py::arg("token_ids"), py::arg("token_map"),
             py::arg("vocab_size"), py::arg("pad_id"), py::arg("barrier_id"), py::arg("order_max"), py::arg("bits"),
             py::arg("out"));
  module.def("keys_of_windows", &keys_of_windows_checked, py::arg("windows"), py::arg("order"), py::arg("bits"),
             py::arg("multipliers"), py::arg("out"));
  module.def("sort_items", &sort_items_checked, py::arg("items"), py::arg("weights") = py::none());
  module.def("sum_items", &sum_items_checked, py::arg("items"), py::arg("weights"), py::arg("shift"));
  module.def("find_items", &find_items_checked, py::arg("haystack"), py::arg("needles"));
}

}  // namespace tierstore
