#include "hash.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace tierstore {
namespace {

__extension__ using Wide = unsigned __int128;

constexpr uint64_t kKeyMax = INT64_MAX;

// Hashes a batch with a window of the last kMaxOrder mapped ids, the token itself first. What ends look-back (a dead
// position, a history that has no token, the barrier) fills the window with the pad id: all of it counts as pad for
// every later token, so nothing else has to be remembered. The order is a constant so that the window stays in
// registers: three times the speed of a loop up to a variable.
template <size_t kMaxOrder>
int64_t mix(const TokenBatch& batch, const NgramHash& hash, int64_t* out) {
  std::array<uint64_t, kMaxOrder> multipliers, window, pads;
  std::array<size_t, kMaxOrder> step{};  // 1 where the XOR up to here is the key of an order
  std::copy_n(hash.multipliers, kMaxOrder, multipliers.begin());
  for (size_t i = 0; i < hash.num_orders; ++i) step[static_cast<size_t>(hash.orders[i]) - 1] = 1;
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
      uint64_t mixed = 0;
      for (size_t back = 0; back < kMaxOrder; ++back) {
        mixed ^= window[back] * multipliers[back];
        *out = static_cast<int64_t>(mixed);  // overwritten by the next where this is no order's; the last always is
        out += step[back];
      }
      if (id == hash.barrier_id) window = pads;
    }
  }
  return -1;
}

using Mix = int64_t (*)(const TokenBatch&, const NgramHash&, int64_t*);

template <size_t... kBelow>
constexpr std::array<Mix, sizeof...(kBelow)> mixes(std::index_sequence<kBelow...>) {
  return {mix<kBelow + 1>...};
}

// One head: its rows, and remainders by multiplication: 1.2 ns each against 2.0 of division on Zen 4, more where
// division is slower. With 2^(shift - 1) < modulus <= 2^shift and factor = ceil(2^(63 + shift) / modulus), which fits
// 64 bits, factor * modulus exceeds 2^(63 + shift) by less than 2^shift; so key * factor / 2^(63 + shift) exceeds key /
// modulus by less than 1 / modulus for every key below 2^63, and both have the same whole part (Granlund and
// Montgomery, Division by Invariant Integers using Multiplication, 1994, theorem 4.2). Doubling the key makes the shift
// by 64 first, which costs nothing. Example: modulus 3 has shift 2, factor ceil(2^65 / 3); key 5 gives 10 * factor /
// 2^64 = 6, shifted by 2 that is 1, and 5 - 1 * 3 = 2.
class Head {
 public:
  Head(int64_t modulus, int64_t offset)
      : modulus_(static_cast<uint64_t>(modulus)),
        offset_(static_cast<uint64_t>(offset)),
        shift_(modulus == 1 ? 0 : 64 - static_cast<unsigned>(__builtin_clzll(static_cast<uint64_t>(modulus) - 1))),
        factor_(static_cast<uint64_t>(((Wide{1} << (63 + shift_)) + modulus_ - 1) / modulus_)) {}

  uint64_t modulus() const { return modulus_; }
  uint64_t residue(uint64_t key) const {
    return key - (static_cast<uint64_t>((Wide{factor_} * (key << 1)) >> 64) >> shift_) * modulus_;
  }
  int64_t row_id(uint64_t key) const { return static_cast<int64_t>(residue(key) + offset_); }
  bool holds(int64_t row_id) const { return static_cast<uint64_t>(row_id) - offset_ < modulus_; }
  uint64_t residue_of_row(int64_t row_id) const { return static_cast<uint64_t>(row_id) - offset_; }

 private:
  uint64_t modulus_;
  uint64_t offset_;
  unsigned shift_;
  uint64_t factor_;
};

std::vector<Head> heads_of(const AddressMap& map) {
  std::vector<Head> heads;
  heads.reserve(map.num_orders * map.rows_per_key);
  for (size_t i = 0; i < map.num_orders * map.rows_per_key; ++i) heads.emplace_back(map.moduli[i], map.offsets[i]);
  return heads;
}

// The key of one order's row ids, by the Chinese remainder theorem: `key` is right for the heads so far, `product` is
// of their moduli, and key + digit * product is right for the next head too. Example: residues 2 of 3 and 1 of 5: key
// 2, digit (1 - 2) * inverse of 3 modulo 5 = -1 * 2 = 3 modulo 5, and so key 2 + 3 * 3 = 11. Returns -1 where all ids
// are -1, and -2 where no key gives them.
int64_t key_of_rows(const int64_t* row_ids, const Head* heads, size_t rows_per_key, const int64_t* inverses,
                    size_t num_residues) {
  constexpr int64_t kNone = -1, kNoKey = -2;
  if (std::all_of(row_ids, row_ids + rows_per_key, [](int64_t id) { return id == -1; })) return kNone;
  for (size_t i = 0; i < num_residues; ++i) {
    if (!heads[i].holds(row_ids[i])) return kNoKey;
  }
  uint64_t key = heads[0].residue_of_row(row_ids[0]);
  uint64_t product = heads[0].modulus();
  for (size_t i = 1; i < num_residues; ++i) {
    const Head& head = heads[i];
    const uint64_t behind = head.residue_of_row(row_ids[i]) + head.modulus() - head.residue(key);
    const uint64_t digit = head.residue(behind * static_cast<uint64_t>(inverses[i]));  // below 2^32 * 2^31
    const Wide next = Wide{digit} * product + key;
    if (next > kKeyMax) return kNoKey;
    key = static_cast<uint64_t>(next);
    product *= head.modulus();  // leaves 64 bits after the last head only, where it is not looked at
  }
  for (size_t i = 0; i < rows_per_key; ++i) {
    if (heads[i].row_id(key) != row_ids[i]) return kNoKey;
  }
  return static_cast<int64_t>(key);
}

}  // namespace

int64_t keys_of_tokens(const TokenBatch& batch, const NgramHash& hash, int64_t* out) {
  static constexpr std::array<Mix, kOrderMax> kMixes = mixes(std::make_index_sequence<kOrderMax>());
  return kMixes[static_cast<size_t>(hash.orders[hash.num_orders - 1]) - 1](batch, hash, out);
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
  const std::vector<Head> heads = heads_of(map);
  for (size_t token = 0; token < num_tokens; ++token, keys += map.num_orders, row_ids += heads.size()) {
    is_consistent[token] = true;
    for (size_t order = 0; order < map.num_orders && is_consistent[token]; ++order) {
      const size_t first = order * map.rows_per_key;
      keys[order] = key_of_rows(row_ids + first, heads.data() + first, map.rows_per_key,
                                residues.inverses + order * residues.residues_max,
                                static_cast<size_t>(residues.num_residues[order]));
      is_consistent[token] = keys[order] >= -1;
    }
    if (!is_consistent[token]) std::fill_n(keys, map.num_orders, -1);
  }
}

}  // namespace tierstore
