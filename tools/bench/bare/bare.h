// What the yardstick's kinds of work share: the list that they work off, and how each is called.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum { kFilesMax = 1024, kDepthMax = 4096, kRangesPerCall = 1024 };

struct list {
  int64_t* items;  // num_items * width numbers
  size_t num_items;
};

struct mode {
  const char* name;
  size_t width;  // numbers of an item
  void (*start)(int num_arguments, char** arguments);
  size_t (*fill)(const char* path);           // NULL where there is nothing to fill
  size_t (*item_bytes)(const int64_t* item);  // bytes that the item puts out
  void (*new_out)(uint8_t* out, size_t num_bytes);
  uint8_t* (*run)(const struct list* list, size_t start, size_t end, uint8_t* place);  // returns the place after it
};

extern const struct mode uring_mode, willneed_mode, entries_mode, train_mode;

_Noreturn void fail(const char* what);  // answers with what and errno, and ends the program
void* map_memory(size_t num_bytes);     // zeroed, in huge pages where the kernel gives them
int64_t* read_numbers(const char* path, size_t width, size_t* num_items);
