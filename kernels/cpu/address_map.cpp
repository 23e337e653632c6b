#include "address_map.h"

#include <algorithm>

namespace tierstore {
namespace {

constexpr uint64_t kKeyMax = INT64_MAX;

}  // namespace

std::vector<Head> heads_of(const AddressMap& map) {
  std::vector<Head> heads;
  heads.reserve(map.num_orders * map.rows_per_key);
  for (size_t i = 0; i < map.num_orders * map.rows_per_key; ++i) heads.emplace_back(map.moduli[i], map.offsets[i]);
  return heads;
}

TokenKeys::TokenKeys(const AddressMap& map, const KeyResidues& residues)
    : rows_per_key_(map.rows_per_key),
      residues_max_(residues.residues_max),
      heads_(heads_of(map)),
      num_residues_(residues.num_residues, residues.num_residues + map.num_orders),
      inverses_(residues.inverses, residues.inverses + map.num_orders * residues.residues_max) {}

// By the Chinese remainder theorem: `key` is right for the heads so far, `product` is of their moduli, and key + digit
// * product is right for the next head too. Example: residues 2 of 3 and 1 of 5: key 2, digit (1 - 2) * inverse of 3
// modulo 5 = -1 * 2 = 3 modulo 5, and so key 2 + 3 * 3 = 11.
int64_t TokenKeys::key(size_t order, const int64_t* row_ids) const {
  constexpr int64_t kNone = -1;
  const Head* heads = heads_.data() + order * rows_per_key_;
  const int64_t* inverses = inverses_.data() + order * residues_max_;
  const auto num_residues = static_cast<size_t>(num_residues_[order]);
  if (std::all_of(row_ids, row_ids + rows_per_key_, [](int64_t id) { return id == -1; })) return kNone;
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
  for (size_t i = 0; i < rows_per_key_; ++i) {
    if (heads[i].row_id(key) != row_ids[i]) return kNoKey;
  }
  return static_cast<int64_t>(key);
}

}  // namespace tierstore
