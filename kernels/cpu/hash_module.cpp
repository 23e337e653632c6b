// The Python face of the mixed hash (hash.h): argument checks, then the work with the interpreter lock released.
// kernels/_cpu.pyi says what each function promises.
#include "hash_module.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "arrays.h"
#include "hash.h"
#include "modules.h"

namespace py = pybind11;

namespace tierstore {
namespace {

NgramHash ngram_hash(const std::optional<Input<int32_t>>& token_map, int64_t vocab_size,
                     const Input<int64_t>& multipliers, const Input<int64_t>& orders, int64_t pad_id,
                     int64_t barrier_id) {
  require(vocab_size > 0 && (!token_map || has_shape(*token_map, {vocab_size})),
          "vocab_size must be positive, token_map [vocab_size]");
  const int64_t* lengths = orders.data();
  const int64_t* factors = multipliers.data();
  const py::ssize_t num_orders = orders.size();
  require(orders.ndim() == 1 && num_orders > 0 && lengths[0] > 0, "orders must ascend from 1 on, at least one of them");
  for (py::ssize_t i = 1; i < num_orders; ++i) {
    require(lengths[i - 1] < lengths[i], "orders must ascend from 1 on, at least one of them");
  }
  require(
      lengths[num_orders - 1] <= static_cast<int64_t>(kOrderMax) && has_shape(multipliers, {lengths[num_orders - 1]}),
      "orders must be 1 to 16, with a multiplier a position");
  return {token_map ? token_map->data() : nullptr, vocab_size, factors,   lengths,
          static_cast<size_t>(num_orders),         pad_id,     barrier_id};
}

// Returns a batch of checked shapes; out: of these, and heads numbers each.
TokenBatch token_batch(const Input<int64_t>& token_ids, const std::optional<Input<int64_t>>& history,
                       const std::optional<Input<bool>>& dead, int64_t order_max, py::ssize_t num_keys,
                       const py::array& out) {
  require(token_ids.ndim() == 2, "token_ids must be [sequences, tokens]");
  const py::ssize_t num_sequences = token_ids.shape(0), num_tokens = token_ids.shape(1);
  require(!history || (history->ndim() == 2 && history->shape(0) == num_sequences && history->shape(1) < order_max),
          "history must be [sequences, fewer than the largest order]");
  require(!dead || has_shape(*dead, {num_sequences, num_tokens}), "dead must be [sequences, tokens]");
  require(has_shape(out, {num_sequences, num_tokens, num_keys}), "out must be [sequences, tokens, orders]");
  return {token_ids.data(),
          history ? history->data() : nullptr,
          dead ? dead->data() : nullptr,
          static_cast<size_t>(num_sequences),
          static_cast<size_t>(num_tokens),
          history ? static_cast<size_t>(history->shape(1)) : 0};
}

int64_t keys_of_tokens_checked(const Input<int64_t>& token_ids, const std::optional<Input<int64_t>>& history,
                               const std::optional<Input<bool>>& dead, const std::optional<Input<int32_t>>& token_map,
                               int64_t vocab_size, const Input<int64_t>& multipliers, const Input<int64_t>& orders,
                               int64_t pad_id, int64_t barrier_id, py::array& out) {
  const NgramHash hash = ngram_hash(token_map, vocab_size, multipliers, orders, pad_id, barrier_id);
  const TokenBatch batch = token_batch(token_ids, history, dead, hash.orders[hash.num_orders - 1], orders.size(), out);
  int64_t* keys = output_of<int64_t>(out, "out must be contiguous int64");
  py::gil_scoped_release released;
  return keys_of_tokens(batch, hash, keys);
}

PolynomialHash polynomial_hash(int64_t vocab_size, const Input<int64_t>& weights, const Input<int64_t>& moduli,
                               int64_t barrier_id) {
  require(vocab_size > 0, "vocab_size must be positive");
  require(moduli.ndim() == 1 && moduli.size() > 0 && weights.ndim() == 2 && weights.shape(0) == moduli.size() &&
              weights.shape(1) >= 1 && weights.shape(1) <= static_cast<py::ssize_t>(kOrderMax),
          "moduli must be [heads], weights [heads, 1 to 16]");
  const PolynomialHash hash{vocab_size,
                            barrier_id,
                            weights.data(),
                            moduli.data(),
                            static_cast<size_t>(moduli.size()),
                            static_cast<size_t>(weights.shape(1))};
  for (size_t head = 0; head < hash.num_heads; ++head) {
    require(hash.moduli[head] >= 1, "moduli must be positive");
    int64_t sum = 0;  // the largest that any n-gram can have
    for (size_t back = 0; back < hash.order_max; ++back) {
      const int64_t weight = hash.weights[head * hash.order_max + back];
      int64_t most = 0;
      require(
          weight >= 0 && !__builtin_mul_overflow(weight, vocab_size, &most) && !__builtin_add_overflow(sum, most, &sum),
          "weights must not be below 0, and their sums below 2^63 for ids below vocab_size");
    }
  }
  return hash;
}

int64_t polynomial_keys_checked(const Input<int64_t>& token_ids, const std::optional<Input<int64_t>>& history,
                                const std::optional<Input<bool>>& dead, int64_t vocab_size,
                                const Input<int64_t>& weights, const Input<int64_t>& moduli, int64_t barrier_id,
                                py::array& out) {
  const PolynomialHash hash = polynomial_hash(vocab_size, weights, moduli, barrier_id);
  const TokenBatch batch =
      token_batch(token_ids, history, dead, static_cast<int64_t>(hash.order_max), moduli.size(), out);
  int64_t* keys = output_of<int64_t>(out, "out must be contiguous int64");
  py::gil_scoped_release released;
  return polynomial_keys_of_tokens(batch, hash, keys);
}

AddressMap address_map(const Input<int64_t>& moduli, const Input<int64_t>& offsets, py::ssize_t num_orders) {
  require(num_orders > 0 && moduli.ndim() == 1 && moduli.size() > 0 && moduli.size() % num_orders == 0 &&
              has_shape(offsets, {moduli.size()}),
          "moduli and offsets must be [orders * rows per key]");
  const int64_t* sizes = moduli.data();
  const int64_t* starts = offsets.data();
  for (py::ssize_t i = 0; i < moduli.size(); ++i) {
    require(sizes[i] >= 1 && starts[i] >= 0 && starts[i] <= INT64_MAX - sizes[i],
            "moduli must be positive, offsets not below 0, and their sums below 2^63");
  }
  return {sizes, starts, static_cast<size_t>(num_orders), static_cast<size_t>(moduli.size() / num_orders)};
}

void row_ids_of_keys_checked(const Input<int64_t>& keys, const std::optional<Input<int64_t>>& order_index,
                             const Input<int64_t>& moduli, const Input<int64_t>& offsets, py::array& out) {
  require(keys.ndim() == 1 && out.ndim() == 2 && out.shape(0) == keys.size() && out.shape(1) > 0 &&
              moduli.size() % out.shape(1) == 0,
          "keys must be [keys], out [keys, rows per key]");
  const AddressMap map = address_map(moduli, offsets, moduli.size() / out.shape(1));
  require(order_index ? has_shape(*order_index, {keys.size()})
                      : keys.size() % static_cast<py::ssize_t>(map.num_orders) == 0,
          "order_index must be [keys], or the keys of whole tokens");
  const int64_t* indices = order_index ? order_index->data() : nullptr;
  for (py::ssize_t i = 0; order_index && i < keys.size(); ++i) {
    require(static_cast<size_t>(indices[i]) < map.num_orders, "order_index must be 0 to orders - 1");
  }
  const int64_t* numbers = keys.data();
  const auto num_keys = static_cast<size_t>(keys.size());
  int64_t* row_ids = output_of<int64_t>(out, "out must be contiguous int64");
  py::gil_scoped_release released;
  row_ids_of_keys(numbers, num_keys, indices, map, row_ids);
}

void keys_of_row_ids_checked(const Input<int64_t>& row_ids, const Input<int64_t>& moduli, const Input<int64_t>& offsets,
                             const Input<int64_t>& num_residues, const Input<int64_t>& inverses, py::array& keys,
                             py::array& is_consistent) {
  const AddressMap map = address_map(moduli, offsets, num_residues.size());
  const KeyResidues residues = key_residues(num_residues, inverses, map);
  require(row_ids.ndim() == 2 && row_ids.shape(1) == moduli.size(), "row_ids must be [tokens, heads]");
  require(has_shape(keys, {row_ids.shape(0), num_residues.size()}) && has_shape(is_consistent, {row_ids.shape(0)}),
          "keys must be [tokens, orders], is_consistent [tokens]");
  const int64_t* ids = row_ids.data();
  const auto num_tokens = static_cast<size_t>(row_ids.shape(0));
  int64_t* out = output_of<int64_t>(keys, "keys must be contiguous int64");
  bool* consistent = output_of<bool>(is_consistent, "is_consistent must be contiguous bool");
  py::gil_scoped_release released;
  keys_of_row_ids(ids, num_tokens, map, residues, out, consistent);
}

// The position of the first id that is neither -1 nor below end; -1: all are valid.
py::ssize_t find_out_of_range(const Input<int64_t>& ids, uint64_t end) {
  constexpr size_t kPart = 1024;      // looked at without a branch
  constexpr size_t kBrief = 1 << 14;  // over sooner than the interpreter lock is given back and taken again
  const int64_t* data = ids.data();
  const auto count = static_cast<size_t>(ids.size());
  std::optional<py::gil_scoped_release> released;
  if (count > kBrief) released.emplace();
  const auto is_out_of_range = [&](size_t i) { return static_cast<uint64_t>(data[i]) + 1 > end; };
  for (size_t start = 0; start < count; start += kPart) {
    const size_t part_end = std::min(count, start + kPart);
    bool any = false;
    for (size_t i = start; i < part_end; ++i) any |= is_out_of_range(i);
    for (size_t i = start; any && i < part_end; ++i) {
      if (is_out_of_range(i)) return static_cast<py::ssize_t>(i);
    }
  }
  return -1;
}

}  // namespace

KeyResidues key_residues(const Input<int64_t>& num_residues, const Input<int64_t>& inverses, const AddressMap& map) {
  require(num_residues.ndim() == 1 && inverses.ndim() == 2 && inverses.shape(0) == num_residues.size(),
          "num_residues must be [orders], inverses [orders, heads]");
  const KeyResidues residues{num_residues.data(), inverses.data(), static_cast<size_t>(inverses.shape(1))};
  for (size_t order = 0; order < map.num_orders; ++order) {
    const int64_t* moduli = map.moduli + order * map.rows_per_key;
    const int64_t* of_order = residues.inverses + order * residues.residues_max;
    const int64_t num_heads = residues.num_residues[order];
    require(num_heads >= 1 && num_heads <= static_cast<int64_t>(std::min(residues.residues_max, map.rows_per_key)),
            "num_residues must be 1 to the heads that there are");
    int64_t product = 1;  // of the moduli before
    for (int64_t head = 1; head < num_heads; ++head) {
      require(moduli[head] < (int64_t{1} << 31) && of_order[head] >= 0 && of_order[head] < moduli[head] &&
                  !__builtin_mul_overflow(product, moduli[head - 1], &product),
              "moduli that fix a key must be below 2^31, inverses below them, all products but the last below 2^63");
    }
  }
  return residues;
}

void bind_hash(py::module_& module) {
  module.def("find_out_of_range", &find_out_of_range, py::arg("ids"), py::arg("end"));
  module.def("keys_of_tokens", &keys_of_tokens_checked, py::arg("token_ids"), py::arg("history"), py::arg("dead"),
             py::arg("token_map"), py::arg("vocab_size"), py::arg("multipliers"), py::arg("orders"), py::arg("pad_id"),
             py::arg("barrier_id"), py::arg("out"));
  module.def("polynomial_keys_of_tokens", &polynomial_keys_checked, py::arg("token_ids"), py::arg("history"),
             py::arg("dead"), py::arg("vocab_size"), py::arg("weights"), py::arg("moduli"), py::arg("barrier_id"),
             py::arg("out"));
  module.def("row_ids_of_keys", &row_ids_of_keys_checked, py::arg("keys"), py::arg("order_index"), py::arg("moduli"),
             py::arg("offsets"), py::arg("out"));
  module.def("keys_of_row_ids", &keys_of_row_ids_checked, py::arg("row_ids"), py::arg("moduli"), py::arg("offsets"),
             py::arg("num_residues"), py::arg("inverses"), py::arg("keys"), py::arg("is_consistent"));
}

}  // namespace tierstore
