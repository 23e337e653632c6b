#include "ticket_module.h"

#include <algorithm>
#include <chrono>

#include "buffers_module.h"
#include "engine.h"

namespace py = pybind11;

namespace tierstore {
namespace {

using Clock = std::chrono::steady_clock;

}  // namespace

bool Ticket::done() {
  drop_released();
  return job_->is_done();
}

void Ticket::cancel() {
  job_->cancel();
  drop_released();
}

bool Ticket::wait(double seconds) {
  const std::shared_ptr<Job> job = job_;  // a signal handler may drop the ticket
  const auto deadline = Clock::now() + std::chrono::duration<double>(std::min(seconds, 1e9));
  for (;;) {
    const std::chrono::duration<double> left = deadline - Clock::now();
    bool done = job->is_done();
    if (!done) {
      const py::gil_scoped_release released;
      done = job->wait(std::max(0.0, std::min(left.count(), kSliceMs / 1000.0)));
    }
    drop_released();
    if (done) {
      names_.check(job->fault);
      return true;
    }
    if (left.count() <= 0) return false;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

void bind_ticket(py::module_& module) {
  py::class_<Ticket>(module, "Ticket", py::module_local())
      .def("done", &Ticket::done)
      .def("cancel", &Ticket::cancel)
      .def("detach", &Ticket::detach)
      .def("wait", &Ticket::wait, py::arg("seconds"));
}

}  // namespace tierstore
