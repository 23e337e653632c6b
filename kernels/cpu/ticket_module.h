// A lookup that Python has submitted, and may wait for.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "fault_names.h"
#include "job.h"

namespace tierstore {

// Dropped, it cancels a job that is not done, unless that was detached: nobody else would see to it that the job's
// output is left alone meanwhile.
class Ticket {
 public:
  Ticket(std::shared_ptr<Job> job, FaultNames names) : job_(std::move(job)), names_(std::move(names)) {}
  ~Ticket() {
    if (!detached_) cancel();
  }
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;

  bool done();
  // Nothing is written to the job's output after this.
  void cancel();
  // Lets the job go on when the ticket is dropped.
  void detach() { detached_ = true; }
  // Waits; Python handles signals meanwhile. Returns false if the time ran out first; raises the job's fault.
  bool wait(double seconds);

 private:
  const std::shared_ptr<Job> job_;
  const FaultNames names_;
  bool detached_ = false;
};

void bind_ticket(pybind11::module_& module);

}  // namespace tierstore
