#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_dataset_index, m) { m.doc() = "Index builders for token datasets."; }
