#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "arrays.h"
#include "epochs.h"
#include "modules.h"
#include "reports.h"

namespace py = pybind11;

namespace tierstore {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kHugeBytes = 2 << 20;
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

// Raises an OSError with errno's number, which callers name the cause by.
[[noreturn]] void raise_os_error(int error) {
  errno = error;
  PyErr_SetFromErrno(PyExc_OSError);
  throw py::error_already_set();
}

struct Mapping {
  void* memory;
  size_t num_bytes;
};

// Maps a descriptor, shared, at a multiple of a huge page, so that huge pages of the file are huge pages of the
// mapping. The array that comes back unmaps it when the last view of it is gone.
py::array_t<uint8_t> map_shared(int fd, size_t num_bytes, bool writable) {
  require(num_bytes > 0 && num_bytes % kPageBytes == 0, "whole pages are mapped");
  // Reserves more than is wanted, to choose the place in it, and gives back what lies on either side.
  void* reserved = mmap(nullptr, num_bytes + kHugeBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) raise_os_error(errno);
  const auto start = reinterpret_cast<uintptr_t>(reserved);
  const uintptr_t at = (start + kHugeBytes - 1) / kHugeBytes * kHugeBytes;
  void* memory = mmap(reinterpret_cast<void*>(at), num_bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ,
                      MAP_SHARED | MAP_FIXED, fd, 0);
  const int error = errno;
  if (at > start) munmap(reserved, at - start);
  const uintptr_t end = start + num_bytes + kHugeBytes;
  if (memory == MAP_FAILED) {
    munmap(reinterpret_cast<void*>(at), end - at);
    raise_os_error(error);
  }
  if (end > at + num_bytes) munmap(reinterpret_cast<void*>(at + num_bytes), end - at - num_bytes);
  auto* mapping = new Mapping{memory, num_bytes};
  py::capsule owner(mapping, [](void* held) {
    auto* gone = static_cast<Mapping*>(held);
    munmap(gone->memory, gone->num_bytes);
    delete gone;
  });
  py::array_t<uint8_t> array(static_cast<py::ssize_t>(num_bytes), static_cast<uint8_t*>(memory), owner);
  if (!writable) py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return array;
}

// Brings a part of a mapping onto huge pages; blocks while it copies. Returns 0 or an errno: it is an advice.
int collapse(ByteArray array, size_t byte_start, size_t num_bytes) {
  const auto size = static_cast<size_t>(array.nbytes());
  require(byte_start <= size && num_bytes <= size - byte_start, "a part of the mapping");
  uint8_t* memory = array.mutable_data() + byte_start;
  const py::gil_scoped_release released;
  return madvise(memory, num_bytes, MADV_COLLAPSE) == 0 ? 0 : errno;
}

uint8_t* checked(ByteArray& block, size_t num_bytes) {
  require(static_cast<size_t>(block.nbytes()) >= num_bytes, "the block is too small");
  return const_cast<uint8_t*>(block.data());
}

EpochLine* line_of(ByteArray& control, uint64_t version) {
  require(version >= 1 && version < uint64_t{1} << (64 - kVersionShift), "versions are 1 to 65,535");
  require(control.writeable(), "a control block of one's own");
  return EpochLine::at(checked(control, kControlBytes), version % 2);
}

void publish_epoch(ByteArray control, uint64_t version, uint64_t epoch) {
  line_of(control, version)->publish(version, epoch);
}

void reclaim_epochs_before(ByteArray control, uint64_t version, uint64_t epoch) {
  line_of(control, version)->reclaim_before(epoch);
}

void reclaim_version(ByteArray control, uint64_t version) { line_of(control, version)->reclaim_all(); }

// How many lookups are in an epoch of either parity, by a client's block. Whatever a client wrote there.
std::pair<uint64_t, uint64_t> active_lookups(ByteArray block) {
  const ClientBlock* client = ClientBlock::of(checked(block, kClientBlockBytes));
  return {client->active[0].value.load(), client->active[1].value.load()};
}

// The same of what a client holds for a device.
std::pair<uint64_t, uint64_t> active_pins(ByteArray block) {
  const ClientBlock* client = ClientBlock::of(checked(block, kClientBlockBytes));
  return {client->pinned[0].value.load(), client->pinned[1].value.load()};
}

// Has the kernel refuse writes to a mapping from now on.
void protect(ByteArray array) {
  require(reinterpret_cast<uintptr_t>(array.data()) % kPageBytes == 0 &&
              array.nbytes() % static_cast<py::ssize_t>(kPageBytes) == 0,
          "whole pages are protected");
  if (mprotect(const_cast<uint8_t*>(array.data()), static_cast<size_t>(array.nbytes()), PROT_READ) != 0)
    raise_os_error(errno);
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
}

// What a client holds of a version's epochs for a device's kernels, counted in its block. What is still held when this
// goes is left then, as what its owner took and was interrupted before it could note; in a forked child, the counts are
// the parent's.
class EpochPin {
 public:
  EpochPin(ByteArray control, uint64_t version, ByteArray block)
      : control_(std::move(control)), block_(std::move(block)) {
    require(version >= 1 && version < uint64_t{1} << (64 - kVersionShift), "versions are 1 to 65,535");
    require(block_.writeable(), "a client's block can be written");
    ClientBlock* client = ClientBlock::of(checked(block_, kClientBlockBytes));
    const EpochLine* line = EpochLine::at(checked(control_, kControlBytes), version % 2);
    gate_ = std::make_unique<EpochGate>(line, version, &client->pinned[0].value, &client->pinned[1].value);
  }

  std::optional<uint64_t> newest() const { return gate_->newest(); }
  ~EpochPin() {
    if (pid_ != getpid()) return;
    for (const uint64_t epoch : pinned_) gate_->leave({epoch, true});
  }
  EpochPin(const EpochPin&) = delete;
  EpochPin& operator=(const EpochPin&) = delete;

  std::optional<uint64_t> pin() {
    pinned_.reserve(pinned_.size() + 1);  // before it is counted
    const EpochView view = gate_->pin();
    if (!view.alive) return std::nullopt;
    pinned_.push_back(view.epoch);
    return view.epoch;
  }
  void unpin(uint64_t epoch) {
    const auto pinned = std::find(pinned_.begin(), pinned_.end(), epoch);
    require(pinned != pinned_.end(), "the epoch is not pinned");
    pinned_.erase(pinned);
    gate_->leave({epoch, true});
  }

 private:
  const pid_t pid_ = getpid();
  std::vector<uint64_t> pinned_;
  ByteArray control_, block_;
  std::unique_ptr<EpochGate> gate_;
};

}  // namespace

void bind_shared(py::module_& module) {
  module.def("map_shared", &map_shared, py::arg("fd"), py::arg("num_bytes"), py::kw_only(), py::arg("writable"));
  module.def("collapse", &collapse, py::arg("array"), py::arg("byte_start"), py::arg("num_bytes"));
  module.def("publish_epoch", &publish_epoch, py::arg("control"), py::arg("version"), py::arg("epoch"));
  module.def("reclaim_epochs_before", &reclaim_epochs_before, py::arg("control"), py::arg("version"), py::arg("epoch"));
  module.def("reclaim_version", &reclaim_version, py::arg("control"), py::arg("version"));
  module.def("active_lookups", &active_lookups, py::arg("block"));
  module.def("active_pins", &active_pins, py::arg("block"));
  module.def("protect", &protect, py::arg("array"));
  py::class_<EpochPin>(module, "EpochPin")
      .def(py::init<ByteArray, uint64_t, ByteArray>(), py::arg("control"), py::arg("version"), py::arg("block"))
      .def("newest", &EpochPin::newest)
      .def("pin", &EpochPin::pin)
      .def("unpin", &EpochPin::unpin, py::arg("epoch"));
}

}  // namespace tierstore
