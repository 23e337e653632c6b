// A job ends in a thread without the interpreter lock, which may be held by whoever waits for that thread. So it only
// puts what it kept alive on a list, and has the interpreter drop that soon: by the next call that comes in here, or
// between two instructions of the main thread.
#include "buffers_module.h"

#include <atomic>
#include <utility>

namespace py = pybind11;

namespace tierstore {
namespace {

int drop_at_leisure(void*) {
  drop_released();
  return 0;
}

class HeldObjects final : public Held {
 public:
  explicit HeldObjects(std::vector<py::object> objects) : objects_(std::move(objects)) {}

  // Takes no lock and no memory. From the moment it is on the list, it may be gone.
  void release() noexcept override {
    HeldObjects* first = released.load();
    do {
      next_ = first;
    } while (!released.compare_exchange_weak(first, this));
    if (first == nullptr && !python_ends.load()) Py_AddPendingCall(&drop_at_leisure, nullptr);
  }

  static void drop_all() {
    HeldObjects* next = released.load() == nullptr ? nullptr : released.exchange(nullptr);
    while (next != nullptr) {
      HeldObjects* held = std::exchange(next, next->next_);
      delete held;
    }
  }

  inline static std::atomic<bool> python_ends{false};

 private:
  inline static std::atomic<HeldObjects*> released{nullptr};

  std::vector<py::object> objects_;
  HeldObjects* next_ = nullptr;
};

}  // namespace

Held* hold_objects(std::vector<py::object> objects) { return new HeldObjects(std::move(objects)); }

void drop_released() { HeldObjects::drop_all(); }

void bind_buffers(py::module_& module) {
  // What comes when the interpreter ends is not dropped: it ends with the process.
  py::module_::import("atexit").attr("register")(py::cpp_function([] { HeldObjects::python_ends = true; }));
  module.def("drop_released", &drop_released);
}

}  // namespace tierstore
