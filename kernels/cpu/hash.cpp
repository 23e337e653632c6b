#include "hash.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace tierstore {
namespace {

// Calls `emit` for each token of a batch with the window of the last kMaxOrder mapped ids, the token itself first. What
// ends look-back (a dead position, a history that has no token, the barrier) fills the window with the pad id: all of
// it counts as pad for every later token, so nothing else has to be remembered. The order is a constant so that the
// window stays in registers: three times the speed of a loop up to a variable. Returns as `keys_of_tokens`.
template <size_t kMaxOrder, typename Hash, typename Emit>
int64_t for_each_window(const TokenBatch& batch, const Hash& hash, const Emit& emit) {
  std::array<uint64_t, kMaxOrder> window, pads;
  pads.fill(static_cast<uint64_t>(hash.pad_id));
  const int64_t* history = batch.history;
  const int64_t* ids = batch.token_ids;
  const bool* dead = batch.dead;

  const auto outside = [&](int64_t id) { return static_cast<uint64_t>(id) >= static_cast<uint64_t>(hash.vocab_size); };
  const auto push = [&](int64_t id) {
    for (size_t back = kMaxOrder - 1; back > 0; --back) window[back] = window[back - 1];
    window[0] = static_cast<uint64_t>(hash.token_map ? hash.token_map[id] : id);
  };

  for (size_t row = 0; row < batch.num_sequences; ++row) {
    const auto row_start = static_cast<int64_t>(row * (batch.num_past + batch.num_tokens));
    window = pads;
    for (size_t i = 0; i < batch.num_past; ++i) {
      const int64_t id = *history++;
      if (id != -1 && outside(id)) return row_start + static_cast<int64_t>(i);
      if (id != -1) push(id);
      if (id == -1 || id == hash.barrier_id) window = pads;
    }
    for (size_t i = 0; i < batch.num_tokens; ++i) {
      const int64_t id = *ids++;
      const bool is_dead = dead != nullptr && *dead++;
      if (!is_dead && outside(id)) return row_start + static_cast<int64_t>(batch.num_past + i);
      if (is_dead) {
        window = pads;
      } else {
        push(id);
      }
      emit(window);
      if (id == hash.barrier_id) window = pads;
    }
  }
  return -1;
}

template <size_t kMaxOrder>
int64_t mix(const TokenBatch& batch, const NgramHash& hash, int64_t* out) {
  std::array<uint64_t, kMaxOrder> multipliers;
  std::array<size_t, kMaxOrder> step{};  // 1 where the XOR up to here is the key of an order
  std::copy_n(hash.multipliers, kMaxOrder, multipliers.begin());
  for (size_t i = 0; i < hash.num_orders; ++i) step[static_cast<size_t>(hash.orders[i]) - 1] = 1;
  return for_each_window<kMaxOrder>(batch, hash, [&](const std::array<uint64_t, kMaxOrder>& window) {
    uint64_t mixed = 0;
    for (size_t back = 0; back < kMaxOrder; ++back) {
      mixed ^= window[back] * multipliers[back];
      *out = static_cast<int64_t>(mixed);  // overwritten by the next where this is no order's; the last always is
      out += step[back];
    }
  });
}

template <size_t kMaxOrder>
int64_t add_up(const TokenBatch& batch, const PolynomialHash& hash, int64_t* out) {
  std::vector<Head> heads;
  heads.reserve(hash.num_heads);
  for (size_t i = 0; i < hash.num_heads; ++i) heads.emplace_back(hash.moduli[i], 0);
  const std::vector<uint64_t> weights(hash.weights, hash.weights + hash.num_heads * kMaxOrder);
  return for_each_window<kMaxOrder>(batch, hash, [&](const std::array<uint64_t, kMaxOrder>& window) {
    const uint64_t* of_head = weights.data();
    for (size_t i = 0; i < heads.size(); ++i, of_head += kMaxOrder) {
      uint64_t sum = 0;
      for (size_t back = 0; back < kMaxOrder; ++back) sum += window[back] * of_head[back];
      *out++ = heads[i].row_id(sum);
    }
  });
}

using Mix = int64_t (*)(const TokenBatch&, const NgramHash&, int64_t*);
using AddUp = int64_t (*)(const TokenBatch&, const PolynomialHash&, int64_t*);

template <size_t... kBelow>
constexpr std::array<Mix, sizeof...(kBelow)> mixes(std::index_sequence<kBelow...>) {
  return {mix<kBelow + 1>...};
}

template <size_t... kBelow>
constexpr std::array<AddUp, sizeof...(kBelow)> sums(std::index_sequence<kBelow...>) {
  return {add_up<kBelow + 1>...};
}

}  // namespace

int64_t keys_of_tokens(const TokenBatch& batch, const NgramHash& hash, int64_t* out) {
  static constexpr std::array<Mix, kOrderMax> kMixes = mixes(std::make_index_sequence<kOrderMax>());
  return kMixes[static_cast<size_t>(hash.orders[hash.num_orders - 1]) - 1](batch, hash, out);
}

int64_t polynomial_keys_of_tokens(const TokenBatch& batch, const PolynomialHash& hash, int64_t* out) {
  static constexpr std::array<AddUp, kOrderMax> kSums = sums(std::make_index_sequence<kOrderMax>());
  return kSums[hash.order_max - 1](batch, hash, out);
}

void row_ids_of_keys(const int64_t* keys, size_t num_keys, const int64_t* order_index, const AddressMap& map,
                     int64_t* out) {
  const std::vector<Head> heads = heads_of(map);
  size_t cycling = 0;
  for (size_t i = 0; i < num_keys; ++i, out += map.rows_per_key) {
    const size_t order = order_index ? static_cast<size_t>(order_index[i]) : cycling;
    if (++cycling == map.num_orders) cycling = 0;
    if (keys[i] < 0) {
      std::fill_n(out, map.rows_per_key, -1);
      continue;
    }
    const Head* of_order = heads.data() + order * map.rows_per_key;
    const auto key = static_cast<uint64_t>(keys[i]);
    for (size_t head = 0; head < map.rows_per_key; ++head) out[head] = of_order[head].row_id(key);
  }
}

void keys_of_row_ids(const int64_t* row_ids, size_t num_tokens, const AddressMap& map, const KeyResidues& residues,
                     int64_t* keys, bool* is_consistent) {
  const TokenKeys token_keys(map, residues);
  const size_t num_heads = map.num_orders * map.rows_per_key;
  for (size_t token = 0; token < num_tokens; ++token, keys += map.num_orders, row_ids += num_heads) {
    is_consistent[token] = true;
    for (size_t order = 0; order < map.num_orders && is_consistent[token]; ++order) {
      keys[order] = token_keys.key(order, row_ids + order * map.rows_per_key);
      is_consistent[token] = keys[order] != TokenKeys::kNoKey;
    }
    if (!is_consistent[token]) std::fill_n(keys, map.num_orders, -1);
  }
}

}  // namespace tierstore
