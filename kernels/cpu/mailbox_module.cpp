// The Python face of mailboxes: argument checks, and what must outlive the thread that serves. kernels/_cpu.pyi says
// what each promises. Whatever takes the server's lock gives the interpreter's back first: who forks holds the one and
// may wait for the other.
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "arrays.h"
#include "engine.h"
#include "engine_module.h"
#include "mailbox.h"
#include "modules.h"

namespace py = pybind11;

namespace tierstore {
namespace {

constexpr const char* kMailboxBlockWanted =
    "a mailbox's block must be contiguous uint8 [mailbox_bytes], writable, at a multiple of 64 bytes";
constexpr size_t kEntryBytesMax = size_t{1} << 30;

MailboxShape shape_of(size_t pairs_max, size_t entry_bytes, size_t rows_per_key = 0) {
  require(pairs_max >= 1 && pairs_max <= kMailboxPairsMax, "pairs_max must be 1 to 2^31 - 1");
  require(entry_bytes >= 1 && entry_bytes <= kEntryBytesMax, "entry_bytes must be 1 to 2^30");
  require(rows_per_key <= kEntryBytesMax, "rows_per_key must be 0 to 2^30");
  return {pairs_max, entry_bytes, rows_per_key};
}

class PyMailboxServer {
 public:
  explicit PyMailboxServer(py::object engine)
      : engine_(std::move(engine)), server_(std::make_unique<MailboxServer>(engine_of(engine_))) {}

  ~PyMailboxServer() {
    if (close(MailboxServer::kEndWaitS)) return;
    // The thread goes on, and uses them.
    engine_.release();
    server_.release();
    for (auto& [id, block] : blocks_) block.release();
  }

  uint64_t add(size_t index, py::array block, size_t pairs_max, bool by_row_id) {
    Engine& engine = engine_of(engine_);
    const Engine::Use use(engine);  // and the interpreter's lock: tables are as they were
    if (!use) throw std::runtime_error("the engine is closed");
    require(index < engine.tables().size(), "there is no such table");
    const Table& table = engine.tables()[index];
    require(table.cache != nullptr || table.resident != nullptr, "the table's rows are not there, or no more");
    const MailboxShape shape = shape_of(pairs_max, table.entry_bytes(), by_row_id ? table.rows_per_key : 0);
    require(block.writeable(), kMailboxBlockWanted);
    uint8_t* data = output_of<uint8_t>(block, kMailboxBlockWanted);
    require(block.ndim() == 1 && static_cast<size_t>(block.nbytes()) >= shape.num_bytes() &&
                reinterpret_cast<uintptr_t>(data) % kMailboxAlignment == 0,
            kMailboxBlockWanted);
    // Before it is served, so that nothing is written to a block that nobody holds.
    auto held = [&] {
      std::map<uint64_t, py::array> blocks;
      blocks.emplace(0, std::move(block));
      return blocks.extract(blocks.begin());
    }();
    {
      const py::gil_scoped_release released;
      held.key() = add_mailbox(index, data, pairs_max, by_row_id);
    }
    return blocks_.insert(std::move(held)).position->first;
  }

  bool remove(uint64_t id, double seconds) {
    bool ended;
    {
      const py::gil_scoped_release released;
      ended = server_->remove(id, seconds);
    }
    if (ended) blocks_.extract(id);
    return ended;
  }

  // Where the time runs out, the old engine is kept: the thread may be in it.
  bool move_to(py::object engine, double seconds) {
    Engine& next = engine_of(engine);
    bool ended;
    {
      const py::gil_scoped_release released;
      ended = server_->move_to(next, seconds);
    }
    std::swap(engine_, engine);
    if (!ended) engine.release();
    return ended;
  }

  bool close(double seconds) {
    bool ended;
    {
      const py::gil_scoped_release released;
      ended = server_->close(seconds);
    }
    if (ended) std::exchange(blocks_, {});
    return ended;
  }

  py::object fault(uint64_t id) {
    std::optional<Fault> fault;
    {
      const py::gil_scoped_release released;
      fault = server_->take_fault(id);
    }
    return fault ? exception_of(engine_, *fault) : py::none();
  }

  uint64_t served(uint64_t id) {
    const py::gil_scoped_release released;
    return server_->served(id);
  }

  void time(uint64_t id) {
    const py::gil_scoped_release released;
    server_->time(id);
  }

  void before_fork() { server_->before_fork(); }
  void after_fork(bool child) { server_->after_fork(child); }

 private:
  uint64_t add_mailbox(size_t index, uint8_t* data, size_t pairs_max, bool by_row_id) {
    try {
      return server_->add(index, data, pairs_max, by_row_id);
    } catch (const std::system_error& error) {
      throw std::runtime_error(std::string("no thread can be had to answer lookups from the device (") + error.what() +
                               "); raise 'ulimit -u' or the cgroup's pids.max");
    }
  }

  py::object engine_;
  std::unique_ptr<MailboxServer> server_;
  std::map<uint64_t, py::array> blocks_;  // by mailbox: kept until they are touched no more
};

}  // namespace

void bind_mailbox(py::module_& module) {
  module.def(
      "mailbox_bytes",
      [](size_t pairs_max, size_t entry_bytes, size_t rows_per_key) {
        return shape_of(pairs_max, entry_bytes, rows_per_key).num_bytes();
      },
      py::arg("pairs_max"), py::arg("entry_bytes"), py::arg("rows_per_key") = 0);
  module.def(
      "mailbox_row_ids_start",
      [](size_t pairs_max, size_t entry_bytes) { return shape_of(pairs_max, entry_bytes).row_ids_start(); },
      py::arg("pairs_max"), py::arg("entry_bytes"));
  module.def(
      "mailbox_pairs_start", [](size_t pairs_max) { return shape_of(pairs_max, 1).pairs_start(); },
      py::arg("pairs_max"));
  module.def(
      "mailbox_entries_start", [](size_t pairs_max) { return shape_of(pairs_max, 1).entries_start(); },
      py::arg("pairs_max"));
  py::class_<PyMailboxServer>(module, "MailboxServer", py::module_local())
      .def(py::init<py::object>(), py::arg("engine"))
      .def("add", &PyMailboxServer::add, py::arg("index"), py::arg("block"), py::arg("pairs_max"),
           py::arg("by_row_id") = false)
      .def("move_to", &PyMailboxServer::move_to, py::arg("engine"), py::arg("seconds"))
      .def("remove", &PyMailboxServer::remove, py::arg("id"), py::arg("seconds"))
      .def("fault", &PyMailboxServer::fault, py::arg("id"))
      .def("served", &PyMailboxServer::served, py::arg("id"))
      .def("time", &PyMailboxServer::time, py::arg("id"))
      .def("close", &PyMailboxServer::close, py::arg("seconds"))
      .def("before_fork", &PyMailboxServer::before_fork)
      .def("after_fork", &PyMailboxServer::after_fork, py::arg("child"));
}

}  // namespace tierstore
