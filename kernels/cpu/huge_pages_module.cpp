#include <memory>
#include <utility>

#include "arrays.h"
#include "huge_pages.h"
#include "modules.h"

namespace py = pybind11;

namespace tierstore {
namespace {

// Keeps the block alive until its thread has ended.
class PyHugePages {
 public:
  PyHugePages(py::array block, double first_look_s) : block_(std::move(block)) {
    require(block_.nbytes() > 0 && first_look_s >= 0 && first_look_s < 1e6,
            "a block, and seconds until it is looked at");
    const auto first_look = std::chrono::milliseconds(static_cast<int64_t>(first_look_s * 1000) + 1);
    constexpr auto kWanted = "the block is contiguous uint8 that may be written";
    require(block_.writeable(), kWanted);
    uint8_t* memory = output_of<uint8_t>(block_, kWanted);
    pages_ = std::make_unique<HugePages>(memory, static_cast<size_t>(block_.nbytes()), first_look);
  }
  ~PyHugePages() {
    if (pages_->is_here()) {
      stop();
    } else {
      static_cast<void>(pages_.release());  // of the parent, whose thread it waits for
    }
  }
  PyHugePages(const PyHugePages&) = delete;
  PyHugePages& operator=(const PyHugePages&) = delete;

  bool start() { return pages_->start(); }
  void stop() {
    const py::gil_scoped_release released;
    if (pages_->is_here()) pages_->stop();
  }
  std::pair<uint64_t, uint64_t> last() const { return pair_of(pages_->last()); }
  std::pair<uint64_t, uint64_t> look() {
    const py::gil_scoped_release released;
    return pair_of(pages_->look());
  }
  uint64_t collapsed_bytes() const { return pages_->collapsed_bytes(); }

 private:
  static std::pair<uint64_t, uint64_t> pair_of(const HugeShare& share) {
    return {share.present_bytes, share.huge_bytes};
  }

  py::array block_;
  std::unique_ptr<HugePages> pages_;
};

}  // namespace

void bind_huge_pages(py::module_& module) {
  py::class_<PyHugePages>(module, "HugePages")
      .def(py::init<py::array, double>(), py::arg("block"), py::arg("first_look_s"))
      .def("start", &PyHugePages::start)
      .def("stop", &PyHugePages::stop)
      .def("last", &PyHugePages::last)
      .def("look", &PyHugePages::look)
      .def("collapsed_bytes", &PyHugePages::collapsed_bytes);
}

}  // namespace tierstore
