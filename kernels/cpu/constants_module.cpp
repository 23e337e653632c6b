// Numbers and names that C++ defines and Python reads, so that nobody copies them by hand.
#include <string>

#include "arrays.h"
#include "engine.h"
#include "entry_cache.h"
#include "entry_index.h"
#include "epochs.h"
#include "hash.h"
#include "mailbox.h"
#include "modules.h"
#include "pages.h"
#include "reports.h"
#include "table.h"

namespace py = pybind11;

namespace tierstore {
namespace {

static_assert(kOrdersMax == size_t{1} << kTagShift && kOrdersMax == std::size(IndexHead{}.num_buckets),
              "an order fits beside a tag, and has a place in the head of an index");

template <size_t N>
py::tuple tuple_of(const char* const (&names)[N]) {
  py::tuple all(N);
  for (size_t i = 0; i < N; ++i) all[i] = py::str(names[i]);
  return all;
}

py::tuple latency_bounds_ns() {
  py::tuple bounds(Latency::kBounds);
  for (size_t i = 0; i < Latency::kBounds; ++i) bounds[i] = py::int_(Latency::bound_ns(i));
  return bounds;
}

py::dict mailbox_starts() {
  py::dict starts;
  starts["requested"] = kMailboxRequested;
  starts["num_misses"] = kMailboxNumMisses;
  starts["answered"] = kMailboxAnswered;
  starts["status"] = kMailboxStatus;
  starts["timed_out"] = kMailboxTimedOut;
  starts["invalid_token_position"] = kMailboxInvalidTokenPosition;
  starts["failed"] = kMailboxFailed;
  starts["keys"] = kMailboxKeys;
  return starts;
}

}  // namespace

void bind_constants(py::module_& module) {
  module.attr("ORDER_MAX") = kOrderMax;
  module.attr("ORDERS_MAX") = kOrdersMax;
  module.attr("SOURCES") = tuple_of(kSourceNames);
  module.attr("PAGE_GOOD") = static_cast<int>(kPageGood);
  module.attr("PAGE_OTHER_VERSION") = static_cast<int>(kPageOtherVersion);
  module.attr("PAGE_OTHER_NUMBER") = static_cast<int>(kPageOtherNumber);
  module.attr("PAGE_BAD_CHECKSUM") = static_cast<int>(kPageBadChecksum);
  module.attr("PAGE_TRAILER_BYTES") = kTrailerBytes;
  module.attr("CACHE_WAYS") = kWays;
  module.attr("CACHE_SET_BYTES") = sizeof(CacheSet);
  module.attr("CACHE_HISTORY_BYTES") = sizeof(CacheHistory);
  module.attr("BUCKET_SLOTS") = kBucketSlots;
  module.attr("CONTROL_BYTES") = kControlBytes;
  module.attr("CLIENT_BLOCK_BYTES") = kClientBlockBytes;
  module.attr("NUM_RING_REPORTS") = kNumRingReports;
  module.attr("LATENCY_BOUNDS_NS") = latency_bounds_ns();
  module.attr("LATENCY_FRACTION") = 1.0 / (1u << Latency::kShareLog2);
  module.attr("MAILBOX_STARTS") = mailbox_starts();
  module.attr("MAILBOX_STATUSES") = tuple_of(kMailboxStatusNames);
}

}  // namespace tierstore
