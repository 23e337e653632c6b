#include "gradient_sums.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "float_rules.h"
#include "shared_rows.h"

namespace tierstore {
namespace {

constexpr size_t kBlock = 32;            // values of a row that are summed over groups at a time
constexpr size_t kPrefetchPlaces = 6;    // references whose gradients are asked for ahead, of this row or later ones
constexpr size_t kUpdateRows = 64;       // rows that update_rows is given at a time
constexpr size_t kValuesEach = 1 << 15;  // of a range of rows that a thread takes: some 20 us
constexpr uint32_t kPlace = DistinctRows::kNewGroup - 1;

struct References {
  const uint32_t* places;
  size_t count;
  size_t rest;  // places of all rows from these on
};

TIERSTORE_BODY References references_of(const DistinctRows& rows, size_t row) {
  const uint32_t start = rows.starts()[row];
  return {rows.places() + start, rows.starts()[row + 1] - start, rows.starts()[rows.count()] - start};
}

TIERSTORE_BODY const float* values_at(const Gradients& gradients, uint32_t place) {
  return gradients.values + (place & kPlace) * gradients.stride;
}

// With the reference that is summed now.
TIERSTORE_BODY void prefetch_later(const Gradients& gradients, const References& references, size_t each) {
  if (each + kPrefetchPlaces >= references.rest) return;
  const char* at = reinterpret_cast<const char*>(values_at(gradients, references.places[each + kPrefetchPlaces]));
  for (size_t i = 0; i < gradients.dim * sizeof(float); i += 64) __builtin_prefetch(at + i, 0);
}

TIERSTORE_BODY bool is_one_group(const References& references) {
  uint32_t flags = 0;
  for (size_t i = 0; i < references.count; ++i) flags |= references.places[i];
  return (flags & DistinctRows::kNewGroup) == 0;
}

TIERSTORE_BODY void sum_one_group(const Gradients& gradients, const References& references, float* __restrict out) {
  const size_t dim = gradients.dim;
  const float* first = values_at(gradients, references.places[0]);
  prefetch_later(gradients, references, 0);
  if (references.count == 1) {
    for (size_t i = 0; i < dim; ++i) out[i] = first[i] + 0.0f;
    return;
  }
  const float* second = values_at(gradients, references.places[1]);
  prefetch_later(gradients, references, 1);
  for (size_t i = 0; i < dim; ++i) out[i] = first[i] + 0.0f + second[i];
  for (size_t each = 2; each < references.count; ++each) {
    const float* next = values_at(gradients, references.places[each]);
    prefetch_later(gradients, references, each);
    for (size_t i = 0; i < dim; ++i) out[i] += next[i];
  }
}

// Values done to done + count of a row, count at most kBlock.
TIERSTORE_BODY void sum_groups(const Gradients& gradients, const References& references, size_t done, size_t count,
                               float* out) {
  float total[kBlock] = {}, part[kBlock] = {};
  for (size_t each = 0; each < references.count; ++each) {
    const uint32_t place = references.places[each];
    if (done == 0) prefetch_later(gradients, references, each);
    if ((place & DistinctRows::kNewGroup) != 0) {
      for (size_t i = 0; i < count; ++i) total[i] += part[i];
      for (size_t i = 0; i < count; ++i) part[i] = 0;
    }
    const float* next = values_at(gradients, place) + done;
    for (size_t i = 0; i < count; ++i) part[i] += next[i];
  }
  for (size_t i = 0; i < count; ++i) out[done + i] = total[i] + part[i];
}

TIERSTORE_BODY void sum_row(const Gradients& gradients, const References& references, float* out) {
  if (is_one_group(references)) return sum_one_group(gradients, references, out);
  size_t done = 0;
  for (; done + kBlock <= gradients.dim; done += kBlock) sum_groups(gradients, references, done, kBlock, out);
  if (done < gradients.dim) sum_groups(gradients, references, done, gradients.dim - done, out);
}

// A number times 0 is 0; of all else it is NaN.
TIERSTORE_BODY bool all_finite(const float* values, size_t dim, float scale) {
  float parts[kParts] = {};
  size_t done = 0;
  for (; done + kParts <= dim; done += kParts) {
    for (size_t i = 0; i < kParts; ++i) parts[i] += values[done + i] * scale * 0.0f;
  }
  for (size_t i = 0; done + i < dim; ++i) parts[i] += values[done + i] * scale * 0.0f;
  return sum_of_parts(parts) == 0.0f;
}

// Where the sum of a row is: its gradient itself if it has one reference, else the next place of those for sums.
TIERSTORE_BODY const float* sum_place(const DistinctRows& rows, const Gradients& gradients, size_t start, size_t row,
                                      float* sums) {
  const References references = references_of(rows, row);
  if (references.count == 1) return values_at(gradients, references.places[0]);
  return sums + (rows.repeated_before()[row] - rows.repeated_before()[start]) * gradients.dim;
}

struct Range {
  const DistinctRows& rows;
  const Gradients& gradients;
  size_t first;       // row whose sum is the first of `sums`
  size_t start, end;  // rows to do
  float* sums;        // of rows with several references
};

// Sums the rows with several references. Returns the first row of the range whose sum is not finite.
TIERSTORE_BODY size_t sum_range_body(const Range& range) {
  size_t bad = kAllFinite;
  for (size_t row = range.start; row < range.end; ++row) {
    const float* sum = sum_place(range.rows, range.gradients, range.first, row, range.sums);
    const References references = references_of(range.rows, row);
    if (references.count > 1) {
      sum_row(range.gradients, references, const_cast<float*>(sum));
    } else {
      prefetch_later(range.gradients, references, 0);
    }
    if (bad == kAllFinite && !all_finite(sum, range.gradients.dim, range.gradients.scale)) bad = row;
  }
  return bad;
}

TIERSTORE_BODY size_t sum_all_body(const Range& range) {
  size_t bad = kAllFinite;
  const size_t dim = range.gradients.dim;
  for (size_t row = range.start; row < range.end; ++row) {
    float* out = range.sums + (row - range.first) * dim;
    sum_row(range.gradients, references_of(range.rows, row), out);
    if (bad == kAllFinite && !all_finite(out, dim, range.gradients.scale)) bad = row;
    for (size_t i = 0; i < dim; ++i) out[i] *= range.gradients.scale;
  }
  return bad;
}

using DoRange = size_t (*)(const Range&);
size_t sum_range_plain(const Range& range) { return sum_range_body(range); }
size_t sum_all_plain(const Range& range) { return sum_all_body(range); }
#if defined(__x86_64__)
TIERSTORE_AVX2 size_t sum_range_avx2(const Range& range) { return sum_range_body(range); }
TIERSTORE_AVX2 size_t sum_all_avx2(const Range& range) { return sum_all_body(range); }
#else
constexpr auto sum_range_avx2 = sum_range_plain;
constexpr auto sum_all_avx2 = sum_all_plain;
#endif

class Step {
 public:
  Step(const Optimizer& optimizer, const Steps& steps, const DistinctRows& rows, const Gradients& gradients,
       float* const* records, float* scratch, size_t num_threads, bool plain)
      : optimizer_(optimizer),
        steps_(steps),
        rows_(rows),
        gradients_(gradients),
        records_(records),
        scratch_(scratch),
        num_threads_(num_threads),
        plain_(plain) {}

  // The end of the rows from `start` on whose sums fit into num_sums.
  size_t chunk_end(size_t start, size_t num_sums) const {
    const uint32_t* before = rows_.repeated_before();
    const uint32_t* end = before + rows_.count() + 1;
    const uint32_t* beyond = std::upper_bound(before + start, end, static_cast<uint64_t>(before[start]) + num_sums);
    return static_cast<size_t>(beyond - before) - 1;
  }

  // Returns the first row whose sum is not finite.
  size_t sum(size_t start, size_t end) const {
    std::atomic<size_t> bad{kAllFinite};
    const DoRange sum_range = plain_ || !has_avx2_fma() ? sum_range_plain : sum_range_avx2;
    share(start, end, [&](size_t from, size_t to) {
      const FloatRules rules;
      const size_t found = sum_range({rows_, gradients_, start, from, to, scratch_});
      size_t first = bad.load(std::memory_order_relaxed);
      while (found < first && !bad.compare_exchange_weak(first, found, std::memory_order_relaxed)) {
      }
    });
    return bad.load();
  }

  // Does not throw: what a crew needs memory for comes before any work, which one thread does as well.
  void update(size_t start, size_t end) const noexcept {
    const auto work = [&](size_t from, size_t to) {
      const float* sums[kUpdateRows];
      for (size_t left = to; left > from;) {  // from the end: its gradients were read last, and may be in a cache still
        const size_t count = std::min(kUpdateRows, left - from);
        left -= count;
        for (size_t i = 0; i < count; ++i) sums[i] = sum_place(rows_, gradients_, start, left + i, scratch_);
        update_rows(optimizer_, steps_, gradients_.dim, count, records_ + left, sums, gradients_.scale, plain_);
      }
    };
    try {
      share(start, end, work);
    } catch (const std::bad_alloc&) {
      work(start, end);
    }
  }

 private:
  template <typename Work>
  void share(size_t start, size_t end, const Work& work) const {
    share_rows(end - start, kValuesEach / gradients_.dim + 1, num_threads_,
               [&](size_t from, size_t to) { work(start + from, start + to); });
  }

  const Optimizer& optimizer_;
  const Steps& steps_;
  const DistinctRows& rows_;
  const Gradients& gradients_;
  float* const* records_;
  float* scratch_;
  size_t num_threads_;
  bool plain_;
};

}  // namespace

size_t sum_gradients(const DistinctRows& rows, const Gradients& gradients, size_t start, size_t end, float* out,
                     bool plain) {
  const FloatRules rules;
  return (plain || !has_avx2_fma() ? sum_all_plain : sum_all_avx2)({rows, gradients, start, start, end, out});
}

size_t apply_gradients(const Optimizer& optimizer, const Steps& steps, const DistinctRows& rows,
                       const Gradients& gradients, float* const* records, float* scratch, size_t scratch_floats,
                       size_t num_threads, bool plain) {
  const Step step(optimizer, steps, rows, gradients, records, scratch, num_threads, plain);
  const size_t num_sums = std::max(scratch_floats / gradients.dim, size_t{1}), count = rows.count();
  const bool fits = step.chunk_end(0, num_sums) >= count;
  for (size_t start = 0, end; start < count; start = end) {
    end = step.chunk_end(start, num_sums);
    const size_t bad = step.sum(start, end);
    if (bad != kAllFinite) return bad;
  }
  for (size_t start = 0, end; start < count; start = end) {
    end = step.chunk_end(start, num_sums);
    if (!fits) step.sum(start, end);
    step.update(start, end);
  }
  return kAllFinite;
}

}  // namespace tierstore
