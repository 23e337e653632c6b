// The mixed hash: token ids to keys, keys to row ids, and row ids of whole tokens back to keys.
//
// Shapes: B sequences, T tokens, P tokens of history, V vocabulary, O orders, H rows per key, N tokens, M keys,
// F at most as many heads as fix a key. Arrays are contiguous. kernels/_cpu.pyi says what each function promises;
// module.cpp has checked shapes and ranges before these are called.
#pragma once

#include <cstddef>
#include <cstdint>

#include "address_map.h"

namespace tierstore {

constexpr size_t kOrderMax = 16;  // the longest n-gram

struct TokenBatch {
  const int64_t* token_ids;  // [B, T]
  const int64_t* history;    // [B, P], not looked at where P is 0
  const bool* dead;          // [B, T], or null: none is
  size_t num_sequences;
  size_t num_tokens;
  size_t num_past;
};

struct NgramHash {
  const int32_t* token_map;  // [V], or null: ids hash as they are
  int64_t vocab_size;
  const int64_t* multipliers;  // [the largest order]
  const int64_t* orders;       // [O], ascending, 1 to kOrderMax
  size_t num_orders;
  int64_t pad_id;
  int64_t barrier_id;  // -1: no barrier
};

// A hash without a key that heads share: each head has the remainder of a weighted sum of the n-gram's ids.
struct PolynomialHash {
  static constexpr const int32_t* token_map = nullptr;  // ids hash as they are
  static constexpr int64_t pad_id = 0;                  // adds nothing to a sum
  int64_t vocab_size;
  int64_t barrier_id;      // -1: no barrier
  const int64_t* weights;  // [heads, order_max], the token itself first, 0 beyond the head's order; vocab_size times
                           // all of a head's is at most 2^63 - 1
  const int64_t* moduli;   // [heads], 1 or more
  size_t num_heads;
  size_t order_max;  // 1 to kOrderMax
};

// Writes keys [B, T, O]; returns the position in [B, P + T] of the first id outside the vocabulary, and `out` is
// undefined; or -1.
int64_t keys_of_tokens(const TokenBatch& batch, const NgramHash& hash, int64_t* out);

// Writes the remainder of each head, [B, T, heads]; returns as `keys_of_tokens`.
int64_t polynomial_keys_of_tokens(const TokenBatch& batch, const PolynomialHash& hash, int64_t* out);

// Writes row ids [M, H]. Key i is of order order_index[i], or of order i mod O where order_index is null.
void row_ids_of_keys(const int64_t* keys, size_t num_keys, const int64_t* order_index, const AddressMap& map,
                     int64_t* out);

// Writes keys [N, O] and whether each token is consistent, [N], of row ids [N, O * H].
void keys_of_row_ids(const int64_t* row_ids, size_t num_tokens, const AddressMap& map, const KeyResidues& residues,
                     int64_t* keys, bool* is_consistent);

}  // namespace tierstore
