#include "entry_cache.h"

#include <algorithm>
#include <new>

#include "mix.h"
#include "racing_copy.h"

namespace tierstore {
namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;

uint64_t hash(uint8_t order, int64_t key) { return mix(static_cast<uint64_t>(key) + order * 0x9E3779B97F4A7C15ull); }

// The low bits of the hash: `reduce` chose the set by the high ones.
uint16_t fingerprint(uint8_t order, int64_t key) {
  const auto low = static_cast<uint16_t>(hash(order, key));
  return low == 0 ? uint16_t{1} : low;
}

// Returns the uses that the history remembers of a key, and forgets it.
uint8_t recall(CacheHistory& history, uint16_t wanted) {
  for (size_t ghost = 0; ghost < kGhosts; ++ghost) {
    if (history.fingerprints[ghost] == wanted) {
      history.fingerprints[ghost] = 0;
      return history.uses[ghost];
    }
  }
  return 0;
}

void remember(CacheHistory& history, uint16_t leaving, uint8_t uses) {
  history.fingerprints[history.next] = leaving;
  history.uses[history.next] = uses;
  history.next = static_cast<uint8_t>((history.next + 1) % kGhosts);
}

}  // namespace

EntryCache::EntryCache(uint8_t* block, size_t num_sets, size_t entry_bytes, bool writable)
    : sets_(reinterpret_cast<CacheSet*>(block)),
      histories_(reinterpret_cast<CacheHistory*>(block + num_sets * sizeof(CacheSet))),
      entries_(block + num_sets * (sizeof(CacheSet) + sizeof(CacheHistory))),
      num_sets_(num_sets),
      entry_bytes_(entry_bytes),
      stride_(entry_stride(entry_bytes)),
      writable_(writable),
      next_ageing_(kAgeAccessesPerEntry * kWays * num_sets) {}

void EntryCache::clear() {
  for (size_t i = 0; i < num_sets_; ++i) {
    CacheSet* set = new (&sets_[i]) CacheSet{};
    for (auto& key : set->keys) key.store(-1, kRelaxed);
    new (&histories_[i]) CacheHistory{};
  }
}

const CacheSet* EntryCache::find_set(uint8_t order, int64_t key) const {
  return &sets_[reduce(hash(order, key), num_sets_)];
}

Probe EntryCache::probe(const CacheSet* set, uint8_t order, int64_t key) const {
  // Without branches: which way holds a key is a coin toss that no processor guesses.
  unsigned same = 0;
  for (unsigned way = 0; way < kWays; ++way) {
    same |= static_cast<unsigned>((set->keys[way].load(kRelaxed) == key) & (set->orders[way].load(kRelaxed) == order))
            << way;
  }
  if (same == 0) return {};
  const int way = __builtin_ctz(same);
  const size_t slot = static_cast<size_t>(set - sets_) * kWays + static_cast<size_t>(way);
  return {set, entries_ + slot * stride_, way};
}

bool EntryCache::copy(const Probe& probe, uint8_t order, int64_t key, uint8_t* to, const uint8_t* next,
                      bool streamed) const {
  const CacheSet* set = probe.set;
  const uint64_t version = set->version.load(std::memory_order_acquire);
  if ((version & 1) != 0 || set->keys[probe.way].load(kRelaxed) != key ||
      set->orders[probe.way].load(kRelaxed) != order) {
    return false;
  }
  racing_copy(to, probe.entry, entry_bytes_, next, streamed);
  std::atomic_thread_fence(std::memory_order_acquire);
  if (set->version.load(kRelaxed) != version) return false;
  if (!writable_) return true;
  auto& count = const_cast<CacheSet*>(set)->counts[probe.way];
  const uint8_t uses = count.load(kRelaxed);
  if (uses < kCountMax) count.store(uses + 1, kRelaxed);  // a lost update costs accuracy only; a hot line stays clean
  return true;
}

void EntryCache::touch(uint8_t order, int64_t key) {
  const Probe found = probe(find_set(order, key), order, key);
  if (found.way < 0) return;
  auto& count = const_cast<CacheSet*>(found.set)->counts[found.way];
  const uint8_t uses = count.load(kRelaxed);
  if (uses < kCountMax) count.store(uses + 1, kRelaxed);
}

void EntryCache::drop_tag(uint8_t tag) {
  for (size_t i = 0; i < num_sets_; ++i) {
    CacheSet& set = sets_[i];
    const uint64_t version = set.version.load(kRelaxed) | 1;
    set.version.store(version, kRelaxed);
    std::atomic_thread_fence(std::memory_order_release);
    for (size_t way = 0; way < kWays; ++way) {
      if (set.orders[way].load(kRelaxed) >> kTagShift == tag) set.keys[way].store(-1, kRelaxed);
    }
    set.version.store(version + 1, std::memory_order_release);
  }
}

void EntryCache::offer(uint8_t order, int64_t key, const uint8_t* entry) {
  CacheSet& set = sets_[reduce(hash(order, key), num_sets_)];
  CacheHistory& history = histories_[&set - sets_];
  const uint64_t version = set.version.load(kRelaxed) | 1;
  const bool abandoned = version == set.version.load(kRelaxed);
  if (!abandoned && probe(&set, order, key).way >= 0) return;
  catch_up(set, history);
  const uint8_t uses = std::min<uint8_t>(kCountMax, recall(history, fingerprint(order, key)) + 1);

  set.version.store(version, kRelaxed);
  std::atomic_thread_fence(std::memory_order_release);
  if (abandoned) {  // another writer died here: nothing of the set can be trusted
    for (auto& other : set.keys) other.store(-1, kRelaxed);
    set.window = 0;
  }
  const size_t way = choose_way(set, history);
  set.keys[way].store(-1, kRelaxed);
  racing_copy(entries_ + (static_cast<size_t>(&set - sets_) * kWays + way) * stride_, entry, entry_bytes_);
  set.orders[way].store(order, kRelaxed);
  set.counts[way].store(uses, kRelaxed);
  set.arrivals[way] = ++set.clock;
  set.window |= static_cast<uint8_t>(1u << way);
  set.keys[way].store(key, kRelaxed);
  set.version.store(version + 1, std::memory_order_release);
}

// Returns the way that a new entry takes, after moving the oldest of a full window out of it: into the set's other
// part, in place of its least used entry where that was not used more, else out of the cache.
size_t EntryCache::choose_way(CacheSet& set, CacheHistory& history) {
  const auto waited = [&set](size_t way) { return static_cast<uint8_t>(set.clock - set.arrivals[way]); };
  int oldest = -1, least_used = -1, empty = -1;
  size_t window_size = 0;
  for (int way = 0; way < static_cast<int>(kWays); ++way) {
    if (set.keys[way].load(kRelaxed) < 0) {
      set.window &= static_cast<uint8_t>(~(1u << way));
      empty = way;
    } else if ((set.window >> way & 1) != 0) {
      ++window_size;
      if (oldest < 0 || waited(way) > waited(oldest)) oldest = way;
    } else {
      const uint8_t uses = set.counts[way].load(kRelaxed);
      const uint8_t least = least_used < 0 ? 0 : set.counts[least_used].load(kRelaxed);
      if (least_used < 0 || uses < least || (uses == least && waited(way) > waited(least_used))) least_used = way;
    }
  }
  if (empty >= 0) {
    if (window_size >= kWindowWays) set.window &= static_cast<uint8_t>(~(1u << oldest));
    return static_cast<size_t>(empty);
  }
  int evicted = oldest;
  if (least_used >= 0 && set.counts[oldest].load(kRelaxed) >= set.counts[least_used].load(kRelaxed)) {
    set.window &= static_cast<uint8_t>(~(1u << oldest));
    evicted = least_used;
  }
  remember(history, fingerprint(set.orders[evicted].load(kRelaxed), set.keys[evicted].load(kRelaxed)),
           set.counts[evicted].load(kRelaxed));
  return static_cast<size_t>(evicted);
}

// Halves the uses of a set and its history as often as the cache has aged since a writer was last here.
void EntryCache::catch_up(CacheSet& set, CacheHistory& history) {
  if (accesses_.load(kRelaxed) >= next_ageing_) {
    next_ageing_ = accesses_.load(kRelaxed) + kAgeAccessesPerEntry * kWays * num_sets_;
    ++age_;
  }
  const auto behind = std::min<uint8_t>(4, static_cast<uint8_t>(age_ - set.age));  // 15 is 0 after four
  if (behind == 0) return;
  set.age = age_;
  for (auto& count : set.counts) count.store(count.load(kRelaxed) >> behind, kRelaxed);
  for (uint8_t& uses : history.uses) uses >>= behind;
}

}  // namespace tierstore
