// Single kernels, of any ISA that this CPU runs, on one thread and on numpy arrays: what a kernel costs without dispatcher or threads.
#pragma once
#include <pybind11/pybind11.h>

namespace kd::native {

void add_raw_kernels(pybind11::module_& m);

}  // namespace kd::native
