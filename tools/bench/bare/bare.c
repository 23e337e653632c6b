// The yardstick: a program that does only the work that a lookup cannot do without, as fast as this machine lets it.
//
//   bare uring DEPTH direct|buffered FILE...     reads ranges of files with io_uring, nothing checked
//   bare willneed WINDOW FILE...                 process_madvise(WILLNEED) WINDOW batches ahead, then a pread of each
//   range bare entries ENTRY_BYTES NUM_ENTRIES THREADS probes an 8-way table for keys and copies their entries
//   bare train RULE DIM NUM_ROWS THREADS         steps of an optimizer on rows in memory: gather, sum, update
//
// It is driven over standard input, a line a command, so that its runs can be interleaved with another program's. Each
// command is answered by one line: "ok ..." or "error ...".
//   fill PATH     entries only: puts (order, key) pairs, two int64 each, into the table
//   load PATH     the list to work off: (file, byte offset, length) as three int64 each, (order, key) as two, or row
//   ids go GROUP      works off the list once, GROUP items at a time (0: all at once); answers the nanoseconds of each
//   group dump PATH     writes what the last run put out, item after item, for a test to look at
//   cpu           answers the nanoseconds of processor time that the program has taken so far
#define _GNU_SOURCE
#include "bare.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static struct list list;
static uint8_t* out;
static size_t out_bytes, out_capacity;

void fail(const char* what) {
  printf("error %s: %s\n", what, strerror(errno));
  fflush(stdout);
  exit(1);
}

void* map_memory(size_t num_bytes) {
  void* memory = mmap(NULL, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  madvise(memory, num_bytes, MADV_HUGEPAGE);
  return memory;
}

int64_t* read_numbers(const char* path, size_t width, size_t* num_items) {
  int fd = open(path, O_RDONLY);
  struct stat status;
  if (fd < 0 || fstat(fd, &status)) fail(path);
  int64_t* numbers = malloc(status.st_size + 8);
  for (off_t done = 0; done < status.st_size;) {
    ssize_t count = read(fd, (uint8_t*)numbers + done, status.st_size - done);
    if (count <= 0) fail(path);
    done += count;
  }
  close(fd);
  *num_items = status.st_size / (width * 8);
  return numbers;
}

static void load(const char* path, const struct mode* mode) {
  free(list.items);
  list.items = read_numbers(path, mode->width, &list.num_items);
  out_bytes = 0;
  for (size_t i = 0; i < list.num_items; ++i) out_bytes += mode->item_bytes(list.items + i * mode->width);
  if (out_bytes > out_capacity) {
    if (out) munmap(out, out_capacity);
    out_capacity = (out_bytes + (2 << 20) - 1) & ~(size_t)((2 << 20) - 1);
    out = map_memory(out_capacity);
    memset(out, 0, out_capacity);  // faults belong to no run
    mode->new_out(out, out_capacity);
  }
}

static uint64_t now_ns(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void go(size_t group, const struct mode* mode) {
  if (!group) group = list.num_items ? list.num_items : 1;
  size_t num_groups = (list.num_items + group - 1) / group;
  uint64_t* elapsed_ns = malloc((num_groups + 1) * sizeof *elapsed_ns);
  uint8_t* place = out;
  for (size_t g = 0; g < num_groups; ++g) {
    size_t start = g * group, end = start + group < list.num_items ? start + group : list.num_items;
    uint64_t started_ns = now_ns(CLOCK_MONOTONIC);
    place = mode->run(&list, start, end, place);
    elapsed_ns[g] = now_ns(CLOCK_MONOTONIC) - started_ns;
  }
  printf("ok");
  for (size_t g = 0; g < num_groups; ++g) printf(" %llu", (unsigned long long)elapsed_ns[g]);
  printf("\n");
  free(elapsed_ns);
}

static void dump(const char* path) {
  FILE* file = fopen(path, "wb");
  if (!file || fwrite(out, 1, out_bytes, file) != out_bytes || fclose(file)) fail(path);
  printf("ok %zu\n", out_bytes);
}

int main(int num_arguments, char** arguments) {
  static const struct mode* const modes[] = {&uring_mode, &willneed_mode, &entries_mode, &train_mode};
  const struct mode* mode = NULL;
  for (size_t i = 0; num_arguments > 2 && i < sizeof modes / sizeof *modes; ++i)
    if (!strcmp(arguments[1], modes[i]->name)) mode = modes[i];
  if (!mode) {
    errno = EINVAL;
    fail("arguments");
  }
  mode->start(num_arguments - 2, arguments + 2);
  printf("ok\n");
  fflush(stdout);
  char line[4200], text[4096];
  size_t number;
  while (fgets(line, sizeof line, stdin)) {
    if (sscanf(line, "go %zu", &number) == 1) {
      go(number, mode);
    } else if (sscanf(line, "load %4095[^\n]", text) == 1) {
      load(text, mode);
      printf("ok %zu\n", list.num_items);
    } else if (sscanf(line, "fill %4095[^\n]", text) == 1 && mode->fill) {
      printf("ok %zu\n", mode->fill(text));
    } else if (sscanf(line, "dump %4095[^\n]", text) == 1) {
      dump(text);
    } else if (!strcmp(line, "cpu\n")) {
      printf("ok %llu\n", (unsigned long long)now_ns(CLOCK_PROCESS_CPUTIME_ID));
    } else {
      printf("error unknown command: %s", line);
    }
    fflush(stdout);
  }
  return 0;
}
