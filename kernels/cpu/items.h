// Items: 128-bit numbers to be counted, the high word first, as rows of a uint64 array [N, 2].
//
// An n-gram is an item as a *window*: the last `order_max` ids, mapped and padded as the hash does it, packed with
// `bits` bits each, the newest in the most significant place. The n-gram of a lower order n is the window without its
// last places, so windows that are sorted are sorted for every order. Example: order_max 3, bits 4, ids 5 then 6 then 7
// (the newest): the window is 0x765, its 2-gram is 0x765 >> 4 = 0x76.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tierstore {

__extension__ using Wide = unsigned __int128;

struct Item {
  uint64_t high, low;

  static Item of(Wide value) { return {static_cast<uint64_t>(value >> 64), static_cast<uint64_t>(value)}; }
  Wide value() const { return Wide{high} << 64 | low; }
};
static_assert(sizeof(Item) == 16, "a row of a uint64 array");

struct Windows {
  const int32_t* token_map;  // [vocab_size], or null: ids as they are
  int64_t vocab_size;
  int64_t pad_id;      // 0 to 2^bits - 1
  int64_t barrier_id;  // -1: no barrier
  unsigned order_max;  // order_max * bits is at most 128
  unsigned bits;       // 1 to 63
};

constexpr int64_t kIdTooWide = -2;

// Writes the window that ends at each token of one document. Returns -1; or, with `out` undefined, the position of the
// first id outside the vocabulary, or kIdTooWide if a mapped id does not fit `bits`.
int64_t windows_of_tokens(const int64_t* token_ids, size_t num_tokens, const Windows& shape, Item* out);

// Writes the mixed hash of each n-gram of `order` ids, shifted to that order, so that its oldest id is in the last
// place; order * bits is at most 128. The newest id meets multipliers[0]. Returns false where an item has more bits.
bool keys_of_windows(const Item* ngrams, size_t num_ngrams, unsigned order, unsigned bits, const int64_t* multipliers,
                     int64_t* out);

// Sorts items ascending, with their rows of weights [num_items, num_weights] unless `weights` is null; equal items keep
// their order. Takes another 16 bytes an item meanwhile; with weights 48, and 8 a weight.
void sort_items(Item* items, size_t num_items, int64_t* weights, size_t num_weights);

constexpr size_t kNotSorted = SIZE_MAX;

// Returns how many distinct items there are after a shift to the right by 0 to 127 bits, or kNotSorted.
size_t count_distinct(const Item* items, size_t num_items, unsigned shift);

// Writes distinct shifted items and the sums of their weights; null: each item weighs 1, and num_weights is 1.
void sum_items(const Item* items, size_t num_items, const int64_t* weights, size_t num_weights, unsigned shift,
               Item* distinct, int64_t* sums);

// Writes the index of each needle in the haystack, or -1. Both ascend, the haystack strictly, which
// `count_distinct` checks.
void find_items(const Item* haystack, size_t haystack_size, const Item* needles, size_t num_needles, int64_t* out);

}  // namespace tierstore
