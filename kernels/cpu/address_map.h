// The address map: a key to the row ids of its heads, and those back to the key.
//
// Shapes: O orders, H rows per key, F at most as many heads as fix a key. Arrays are contiguous.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tierstore {

struct AddressMap {
  const int64_t* moduli;   // [O, H], 1 to 2^63 - 1
  const int64_t* offsets;  // [O, H], not below 0, modulus and offset together at most 2^63 - 1
  size_t num_orders;
  size_t rows_per_key;
};

struct KeyResidues {
  const int64_t* num_residues;  // [O], 1 to F: the first heads of the order, whose residues give the key
  const int64_t* inverses;      // [O, F], of the product of the moduli before, modulo this one; [:, 0] is not looked at
  size_t residues_max;          // F
};

__extension__ using Wide = unsigned __int128;

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

std::vector<Head> heads_of(const AddressMap& map);

// Keys of whole tokens' row ids. It keeps what it is made of.
class TokenKeys {
 public:
  static constexpr int64_t kNoKey = -2;

  TokenKeys(const AddressMap& map, const KeyResidues& residues);

  // Returns the key of an order's row ids, [H]: -1 if all of them are -1, kNoKey if no key gives them.
  int64_t key(size_t order, const int64_t* row_ids) const;

 private:
  const size_t rows_per_key_, residues_max_;
  const std::vector<Head> heads_;
  const std::vector<int64_t> num_residues_, inverses_;
};

}  // namespace tierstore
