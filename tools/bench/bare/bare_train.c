// Steps of the yardstick: rows in one block of memory, by row id, each with its optimizer's state behind it.
//
// A run is one step of a batch of row ids: copy the values of every reference to the output, as a model's forward needs
// them; find the distinct rows; sum the gradients of each in the order of the batch; update. Nothing is checked, and no
// sum is kept: a row's sum is made where its update needs it. The gradient of a reference depends on its place in the
// batch only (gradient_at). The rates are fixed.
#define _GNU_SOURCE
#include <errno.h>
#ifdef __AVX__
#include <immintrin.h>
#endif
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "bare.h"

enum { kThreadsMax = 64, kLineBytes = 64, kAhead = 4, kPlacesAhead = 6, kParts = 16, kDimMax = 4096 };
static const float kRate = 0.01f, kEps = 1e-8f, kBeta1 = 0.9f, kBeta2 = 0.999f;

enum rule { kSgd, kAdagrad, kAdam };
static enum rule rule;
static size_t dim, record_floats, num_rows, num_threads, num_steps;
static float *records, *gradients;
static size_t gradients_capacity;

// Of one batch: distinct rows, and for each where its references begin among `places`.
static struct {
  const int64_t* row_ids;
  float* out;
  size_t count, num_distinct, capacity, table_mask;
  unsigned table_shift;
  int64_t* distinct;
  uint32_t *starts, *places, *row_of, *table;
} batch;

static size_t row_out_bytes(const int64_t* item) { return (void)item, dim * sizeof(float); }

static float gradient_at(size_t i) { return (float)((uint32_t)i * 2654435761u >> 16) / 65536.0f - 0.5f; }

// Room for batches as large as the output; faults belong to no run.
static void train_new_out(uint8_t* out, size_t num_bytes) {
  (void)out;
  size_t capacity = num_bytes / (dim * sizeof(float));
  gradients = map_memory(capacity * dim * sizeof *gradients);
  for (size_t i = 0; i < capacity * dim; ++i) gradients[i] = gradient_at(i);
  gradients_capacity = batch.capacity = capacity;
  batch.table_shift = 63;
  while (((size_t)1 << (64 - batch.table_shift)) < 2 * capacity) --batch.table_shift;
  batch.table_mask = ((size_t)1 << (64 - batch.table_shift)) - 1;
  batch.distinct = map_memory(capacity * sizeof(int64_t));
  batch.starts = map_memory((capacity + 1) * sizeof(uint32_t));
  batch.places = map_memory(capacity * sizeof(uint32_t));
  batch.row_of = map_memory(capacity * sizeof(uint32_t));
  batch.table = map_memory((batch.table_mask + 1) * sizeof(uint32_t));
}

static void find_distinct(void) {
  uint32_t found = 0;
  memset(batch.table, -1, (batch.table_mask + 1) * sizeof(uint32_t));
  memset(batch.starts, 0, (batch.count + 1) * sizeof(uint32_t));
  for (size_t i = 0; i < batch.count; ++i) {
    int64_t row = batch.row_ids[i];
    size_t slot = (uint64_t)row * 0x9E3779B97F4A7C15u >> batch.table_shift;
    while (batch.table[slot] != UINT32_MAX && batch.distinct[batch.table[slot]] != row)
      slot = (slot + 1) & batch.table_mask;
    if (batch.table[slot] == UINT32_MAX) batch.distinct[batch.table[slot] = found++] = row;
    batch.row_of[i] = batch.table[slot];
    ++batch.starts[batch.row_of[i] + 1];
  }
  for (size_t i = 0; i < found; ++i) batch.starts[i + 1] += batch.starts[i];
  for (size_t i = 0; i < batch.count; ++i) batch.places[batch.starts[batch.row_of[i]]++] = i;
  memmove(batch.starts + 1, batch.starts, found * sizeof(uint32_t));
  batch.starts[0] = 0;
  batch.num_distinct = found;
}

static void fetch(const float* at, size_t num_floats) {
  const uint8_t* bytes = (const uint8_t*)at;
  for (size_t i = 0; i < num_floats * sizeof(float); i += kLineBytes) __builtin_prefetch(bytes + i);
}

static void fetch_to_write(const float* at, size_t num_floats) {
  const uint8_t* bytes = (const uint8_t*)at;
  for (size_t i = 0; i < num_floats * sizeof(float); i += kLineBytes) __builtin_prefetch(bytes + i, 1);
}

// Past the caches if that is faster: a large output would only push out what is copied next.
static void copy_values(float* to, const float* from) {
#ifdef __AVX__
  if (dim % 8 == 0) {
    for (size_t i = 0; i < dim; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
    return;
  }
#endif
  memcpy(to, from, dim * sizeof(float));
}

static void gather(size_t start, size_t end) {
  for (size_t i = start; i < end; ++i) {
    if (i + kAhead < end) fetch(records + batch.row_ids[i + kAhead] * record_floats, dim);
    copy_values(batch.out + i * dim, records + batch.row_ids[i] * record_floats);
  }
}

// Asks for the gradient of a reference further on, in the order of summing.
static void fetch_later(const uint32_t* place) {
  if (place + kPlacesAhead < batch.places + batch.count) fetch(gradients + place[kPlacesAhead] * dim, dim);
}

// Returns the row's gradient: the only one, or the sum, which lies in `sum`.
static const float* sum_of(size_t row, float* restrict sum) {
  const uint32_t *place = batch.places + batch.starts[row], *end = batch.places + batch.starts[row + 1];
  const float* first = gradients + place[0] * dim;
  fetch_later(place);
  if (end - place == 1) return first;
  const float* second = gradients + place[1] * dim;
  fetch_later(place + 1);
  for (size_t i = 0; i < dim; ++i) sum[i] = first[i] + second[i];
  for (place += 2; place < end; ++place) {
    const float* next = gradients + *place * dim;
    fetch_later(place);
    for (size_t i = 0; i < dim; ++i) sum[i] += next[i];
  }
  return sum;
}

static void sgd(float* restrict values, const float* restrict gradient, float rate) {
  for (size_t i = 0; i < dim; ++i) values[i] -= rate * gradient[i];
}

static void adagrad(float* restrict values, const float* restrict gradient) {
  float parts[kParts] = {0}, total = 0;
  size_t done = 0;
  for (; done + kParts <= dim; done += kParts)
    for (size_t i = 0; i < kParts; ++i) parts[i] += gradient[done + i] * gradient[done + i];
  for (size_t i = 0; i < kParts; ++i) total += parts[i];
  for (; done < dim; ++done) total += gradient[done] * gradient[done];
  values[dim] += total / dim;
  sgd(values, gradient, kRate / (sqrtf(values[dim]) + kEps));
}

static void adam(float* restrict values, const float* restrict gradient, float rate) {
  float* restrict first = values + dim, * restrict second = values + 2 * dim;
  for (size_t i = 0; i < dim; ++i) {
    first[i] += (gradient[i] - first[i]) * (1 - kBeta1);
    second[i] += (gradient[i] * gradient[i] - second[i]) * (1 - kBeta2);
    values[i] -= rate * first[i] / (sqrtf(second[i]) + kEps);
  }
}

static void update(size_t start, size_t end) {
  float sum[kDimMax];
  float rate = kRate * sqrt(1 - pow(kBeta2, num_steps)) / (1 - pow(kBeta1, num_steps));
  for (size_t row = start; row < end; ++row) {
    if (row + kAhead < end) fetch_to_write(records + batch.distinct[row + kAhead] * record_floats, record_floats);
    float* values = records + batch.distinct[row] * record_floats;
    const float* gradient = sum_of(row, sum);
    if (rule == kSgd) sgd(values, gradient, kRate);
    if (rule == kAdagrad) adagrad(values, gradient);
    if (rule == kAdam) adam(values, gradient, rate);
  }
}

// Threads: worker t takes the t-th part of what lies between two barriers.
static pthread_barrier_t begin, finish;
static void (*work)(size_t start, size_t end);
static size_t work_count;

static void work_part(size_t thread) {
  work(work_count * thread / num_threads, work_count * (thread + 1) / num_threads);
}

static void* serve(void* thread) {
  for (;;) {
    pthread_barrier_wait(&begin);
    work_part((size_t)thread);
    pthread_barrier_wait(&finish);
  }
  return NULL;
}

static void share(void (*shared)(size_t start, size_t end), size_t count) {
  work = shared, work_count = count;
  if (num_threads > 1) pthread_barrier_wait(&begin);
  work_part(0);
  if (num_threads > 1) pthread_barrier_wait(&finish);
}

static void train_start(int num_arguments, char** arguments) {
  static const char* const names[] = {"sgd", "row_wise_adagrad", "lazy_adam"};
  int named = -1;
  for (int i = 0; num_arguments == 4 && i < 3; ++i)
    if (!strcmp(arguments[0], names[i])) named = i;
  dim = named < 0 ? 0 : strtoull(arguments[1], NULL, 10);
  num_rows = named < 0 ? 0 : strtoull(arguments[2], NULL, 10);
  num_threads = named < 0 ? 0 : strtoull(arguments[3], NULL, 10);
  if (!dim || dim > kDimMax || !num_rows || num_threads < 1 || num_threads > kThreadsMax) {
    errno = EINVAL;
    fail("train sgd|row_wise_adagrad|lazy_adam DIM NUM_ROWS THREADS");
  }
  rule = named;
  record_floats = rule == kSgd ? dim : rule == kAdagrad ? dim + 4 : 3 * dim;  // in 16 bytes
  records = map_memory(num_rows * record_floats * sizeof *records);
  memset(records, 0, num_rows * record_floats * sizeof *records);
  pthread_barrier_init(&begin, NULL, num_threads);
  pthread_barrier_init(&finish, NULL, num_threads);
  for (size_t thread = 1; thread < num_threads; ++thread) {
    pthread_t id;
    if ((errno = pthread_create(&id, NULL, serve, (void*)thread))) fail("pthread_create");
  }
}

// Every step writes its rows to the same place, as a model that takes its output again.
static uint8_t* train_run(const struct list* list, size_t start, size_t end, uint8_t* place) {
  batch.row_ids = list->items + start, batch.count = end - start, batch.out = (float*)place;
  ++num_steps;
  share(gather, batch.count);
  find_distinct();
  share(update, batch.num_distinct);
  return place;
}

const struct mode train_mode = {"train", 1, train_start, NULL, row_out_bytes, train_new_out, train_run};
