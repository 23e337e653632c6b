#include <algorithm>
#include <cstring>

#include "arrays.h"
#include "modules.h"

namespace py = pybind11;

namespace tierstore {
namespace {

constexpr size_t kAhead = 4;         // entries that are asked of memory before they are copied
constexpr size_t kLineBytes = 64;    // of the processor's caches
constexpr size_t kAheadBytes = 512;  // of each; the processor goes on by itself

void place_entries(const Input<uint8_t>& entries, const Input<int64_t>& places, py::array& out, size_t byte_start) {
  require(entries.ndim() == 2 && places.ndim() == 1, "entries must be [M, width], and places [N]");
  require(out.ndim() == 2 && out.shape(0) == places.shape(0), "out must be [N, bytes]");
  const auto count = static_cast<size_t>(places.shape(0)), num_entries = static_cast<size_t>(entries.shape(0));
  const auto width = static_cast<size_t>(entries.shape(1)), stride = static_cast<size_t>(out.shape(1));
  require(width <= stride && byte_start <= stride - width, "out has no room for an entry at byte_start");
  uint8_t* to = output_of<uint8_t>(out, "out must be contiguous uint8") + byte_start;
  const int64_t* from = places.data();
  const uint8_t* bytes = entries.data();
  const py::gil_scoped_release released;
  // Loaded once: the array may change meanwhile.
  const auto take = [&](size_t i) {
    const int64_t place = __atomic_load_n(from + i, __ATOMIC_RELAXED);
    require(place >= -1 && (place < 0 || static_cast<size_t>(place) < num_entries), "a place is outside the entries");
    return place < 0 ? nullptr : bytes + static_cast<size_t>(place) * width;
  };
  const uint8_t* ahead[kAhead];
  for (size_t i = 0; i < count + kAhead; ++i) {
    if (i >= kAhead) {
      const uint8_t* entry = ahead[i % kAhead];
      uint8_t* at = to + (i - kAhead) * stride;
      if (entry == nullptr) {
        std::memset(at, 0, width);
      } else {
        std::memcpy(at, entry, width);
      }
    }
    if (i < count) {
      const uint8_t* entry = ahead[i % kAhead] = take(i);
      if (entry == nullptr) continue;
      for (size_t line = 0; line < std::min(width, kAheadBytes); line += kLineBytes) __builtin_prefetch(entry + line);
    }
  }
}

}  // namespace

void bind_place_entries(py::module_& module) {
  module.def("place_entries", &place_entries, py::arg("entries"), py::arg("places"), py::arg("out"),
             py::arg("byte_start") = 0);
}

}  // namespace tierstore
