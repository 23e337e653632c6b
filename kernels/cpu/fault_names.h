// Faults as Python exceptions: what an engine was given to name them raises here.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "job.h"

namespace tierstore {

// make_fault(kind: str, table: int, page: int, detail: int) -> BaseException. Every method needs the interpreter lock.
class FaultNames {
 public:
  explicit FaultNames(pybind11::object make_fault) : make_fault_(std::move(make_fault)) {}

  // Returns the exception that stands for a fault.
  pybind11::object exception(const Fault& fault) const {
    static const char* const kNames[] = {"none",  "page",   "disk",      "timeout", "forked",
                                         "entry", "memory", "cancelled", "closed"};
    pybind11::object made = make_fault_(kNames[static_cast<int>(fault.kind)], fault.table, fault.page, fault.detail);
    if (!PyExceptionInstance_Check(made.ptr())) throw pybind11::type_error("make_fault must return an exception");
    return made;
  }

  [[noreturn]] void raise(const Fault& fault) const {
    const pybind11::object made = exception(fault);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())), made.ptr());
    throw pybind11::error_already_set();
  }

  // Raises a fault, if it is one.
  void check(const Fault& fault) const {
    if (fault.kind != FaultKind::kNone) raise(fault);
  }

 private:
  pybind11::object make_fault_;
};

}  // namespace tierstore
