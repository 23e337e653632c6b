#include "stack_distances.h"

#include <algorithm>
#include <vector>

namespace tierstore {
namespace {

constexpr size_t kWordBits = 64;
constexpr size_t kAhead = 16;  // accesses whose last one is on its way while an earlier one is counted

// A set of places in 0 .. num_places - 1 that counts those up to a place: a bit a place, and a Fenwick tree over words
// of 64
// ("A new data structure for cumulative frequency tables", 1994). A tree over places would be 32 times larger and out
// of the caches, which is where the time goes.
class PlaceCounts {
 public:
  explicit PlaceCounts(size_t num_places) : words_(num_places / kWordBits + 1), tree_(words_.size() + 1) {}

  void add(size_t place) {
    words_[place / kWordBits] |= bit(place);
    for (size_t node = place / kWordBits + 1; node < tree_.size(); node += node & -node) ++tree_[node];
  }
  void remove(size_t place) {
    words_[place / kWordBits] &= ~bit(place);
    for (size_t node = place / kWordBits + 1; node < tree_.size(); node += node & -node) --tree_[node];
  }
  // How many there are at `place` and before it.
  int64_t count(size_t place) const {
    const uint64_t up_to = words_[place / kWordBits] & (bit(place) | (bit(place) - 1));
    int64_t sum = __builtin_popcountll(up_to);
    for (size_t node = place / kWordBits; node > 0; node &= node - 1) sum += tree_[node];
    return sum;
  }

 private:
  static uint64_t bit(size_t place) { return uint64_t{1} << place % kWordBits; }

  std::vector<uint64_t> words_;
  std::vector<int64_t> tree_;
};

}  // namespace

// Bennett and Kruskal, "LRU Stack Processing", 1975: the places of every item's last access are counted; those behind
// the item's own are the distinct items since.
void stack_distances(const int64_t* items, size_t num_accesses, int64_t* out) {
  if (num_accesses == 0) return;
  std::vector<int64_t> last(static_cast<size_t>(*std::max_element(items, items + num_accesses)) + 1, -1);
  PlaceCounts counts(num_accesses);
  int64_t num_seen = 0;
  for (size_t i = 0; i < num_accesses; ++i) {
    if (i + kAhead < num_accesses) __builtin_prefetch(&last[static_cast<size_t>(items[i + kAhead])], 1);
    int64_t& before = last[static_cast<size_t>(items[i])];
    if (before < 0) {
      out[i] = -1;
      ++num_seen;
    } else {
      out[i] = num_seen - counts.count(static_cast<size_t>(before));
      counts.remove(static_cast<size_t>(before));
    }
    counts.add(i);
    before = static_cast<int64_t>(i);
  }
}

}  // namespace tierstore
