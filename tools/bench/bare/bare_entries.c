// Entries of the yardstick: an 8-way table in one block of huge pages, probed and copied with software prefetch.
//
// A set's header is 128 bytes: 8 keys (one cache line), then 8 orders. An entry's bytes lie at (set * 8 + way) *
// entry_bytes. While entry i is copied line by line, the lines of entry i + kEntriesAhead are fetched, one for each
// line copied, and the headers of those kHeadersAhead further on: the memory always has work, and never more than its
// queues hold.
#define _GNU_SOURCE
#include <errno.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "bare.h"

enum { kWays = 8, kHeadersAhead = 18, kEntriesAhead = 4, kThreadsMax = 64, kLineBytes = 64, kStreamedBytes = 1 << 20 };

struct set {
  int64_t keys[kWays];  // -1: empty
  uint8_t orders[kWays];
  uint8_t unused[56];
};

static size_t entry_bytes, num_sets, num_threads;
static struct set* sets;
static uint8_t* entries;

static size_t entry_out_bytes(const int64_t* item) { return (void)item, entry_bytes; }
static void ignore_out(uint8_t* out, size_t num_bytes) { (void)out, (void)num_bytes; }

static size_t set_of(const int64_t* item) {
  uint64_t mixed = ((uint64_t)item[1] ^ (uint64_t)item[0] << 56) * 0x9E3779B97F4A7C15u;
  mixed = (mixed ^ mixed >> 29) * 0x9E3779B97F4A7C15u;
  return (mixed >> 32) * num_sets >> 32;
}

// Returns where the entry is; a full set's keys overflow into the next one. Ends the program for a key that is not
// there.
static const uint8_t* find(const int64_t* item) {
  size_t set = set_of(item);
  for (size_t probes = 0; probes < num_sets; ++probes, set = set + 1 == num_sets ? 0 : set + 1)
    for (size_t way = 0; way < kWays; ++way)
      if (sets[set].keys[way] == item[1] && sets[set].orders[way] == item[0])
        return entries + (set * kWays + way) * entry_bytes;
  errno = ENOENT;
  fail("a key of the list");
}

static void fetch(const uint8_t* bytes, size_t start, size_t end) {
  for (; start < end; start += kLineBytes) __builtin_prefetch(bytes + start);
}

// Stores past the caches where that is faster: the output of a large batch would only push out what is copied next.
static void copy_line(uint8_t* to, const uint8_t* from, int streamed) {
#ifdef __AVX512F__
  if (streamed) {
    _mm512_stream_si512((void*)to, _mm512_loadu_si512(from));
    return;
  }
#endif
  (void)streamed;
  memcpy(to, from, kLineBytes);
}

static void copy_fetching(uint8_t* to, const uint8_t* from, const uint8_t* next, int streamed) {
  size_t done = 0;
  for (; done + kLineBytes <= entry_bytes; done += kLineBytes) {
    if (next) __builtin_prefetch(next + done);
    copy_line(to + done, from + done, streamed);
  }
  if (next) fetch(next, done, entry_bytes);
  memcpy(to + done, from + done, entry_bytes - done);
}

static void copy_slice(const int64_t* items, size_t count, uint8_t* place) {
  const uint8_t* found[kEntriesAhead];
  int streamed = count * entry_bytes > kStreamedBytes && !(((uintptr_t)place | entry_bytes) % kLineBytes);
  for (size_t i = 0; i < count && i < kHeadersAhead; ++i) fetch((uint8_t*)&sets[set_of(items + i * 2)], 0, 128);
  for (size_t i = 0; i < count && i < kEntriesAhead; ++i) {
    found[i] = find(items + i * 2);
    fetch(found[i], 0, entry_bytes);
  }
  for (size_t i = 0; i < count; ++i, place += entry_bytes) {
    if (i + kHeadersAhead < count) fetch((uint8_t*)&sets[set_of(items + (i + kHeadersAhead) * 2)], 0, 128);
    const uint8_t* next = i + kEntriesAhead < count ? find(items + (i + kEntriesAhead) * 2) : NULL;
    copy_fetching(place, found[i % kEntriesAhead], next, streamed);
    found[i % kEntriesAhead] = next;
  }
}

// Threads: worker t copies the t-th part of what lies between two barriers.
static pthread_barrier_t begin, finish;
static struct {
  const int64_t* items;
  size_t count;
  uint8_t* place;
} work;

static void copy_part(size_t thread) {
  size_t start = work.count * thread / num_threads, end = work.count * (thread + 1) / num_threads;
  copy_slice(work.items + start * 2, end - start, work.place + start * entry_bytes);
}

static void* serve(void* thread) {
  for (;;) {
    pthread_barrier_wait(&begin);
    copy_part((size_t)thread);
    pthread_barrier_wait(&finish);
  }
  return NULL;
}

static void entries_start(int num_arguments, char** arguments) {
  entry_bytes = num_arguments == 3 ? strtoull(arguments[0], NULL, 10) : 0;
  num_threads = num_arguments == 3 ? strtoull(arguments[2], NULL, 10) : 0;
  if (!entry_bytes || num_threads < 1 || num_threads > kThreadsMax) {
    errno = EINVAL;
    fail("entries ENTRY_BYTES NUM_ENTRIES THREADS");
  }
  num_sets = strtoull(arguments[1], NULL, 10) * 5 / 4 / kWays + 1;  // four fifths full: few sets overflow
  sets = map_memory(num_sets * sizeof *sets);
  entries = map_memory(num_sets * kWays * entry_bytes);
  memset(sets, -1, num_sets * sizeof *sets);
  pthread_barrier_init(&begin, NULL, num_threads);
  pthread_barrier_init(&finish, NULL, num_threads);
  for (size_t thread = 1; thread < num_threads; ++thread) {
    pthread_t id;
    if ((errno = pthread_create(&id, NULL, serve, (void*)thread))) fail("pthread_create");
  }
}

// Puts pairs in; an entry's bytes are its key plus the number of the word, so that no two look alike.
static size_t entries_fill(const char* path) {
  size_t count;
  int64_t* items = read_numbers(path, 2, &count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t* item = items + i * 2;
    size_t set = set_of(item), way = 0;
    for (size_t probes = 0; sets[set].keys[way] != -1;) {
      if (++way < kWays) continue;
      way = 0;
      set = set + 1 == num_sets ? 0 : set + 1;
      if (++probes == num_sets) {
        errno = ENOSPC;
        fail("filling the table");
      }
    }
    sets[set].keys[way] = item[1];
    sets[set].orders[way] = item[0];
    uint8_t* entry = entries + (set * kWays + way) * entry_bytes;
    for (size_t word = 0; word * 8 + 8 <= entry_bytes; ++word) {
      int64_t value = item[1] + word;
      memcpy(entry + word * 8, &value, 8);
    }
  }
  free(items);
  return count;
}

static uint8_t* entries_run(const struct list* list, size_t start, size_t end, uint8_t* place) {
  work.items = list->items + start * 2, work.count = end - start, work.place = place;
  if (num_threads == 1) {
    copy_part(0);
  } else {
    pthread_barrier_wait(&begin);
    copy_part(0);
    pthread_barrier_wait(&finish);
  }
  return place + (end - start) * entry_bytes;
}

const struct mode entries_mode = {"entries", 2, entries_start, entries_fill, entry_out_bytes, ignore_out, entries_run};
