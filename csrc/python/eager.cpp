#include "python/eager.h"

#include <stdexcept>
#include <string>

#include "python/module.h"

namespace py = pybind11;

namespace prunekern {
namespace eager {

PyObject* finish(PyObject* y, void (*run)(void* call), void* call) {
  PyObject* error_type = nullptr;
  std::string error;
  Py_BEGIN_ALLOW_THREADS;
  try {
    run(call);
  } catch (const std::invalid_argument& refused) {
    error_type = PyExc_ValueError;
    error = refused.what();
  } catch (const std::exception& failed) {
    error_type = PyExc_RuntimeError;
    error = failed.what();
  }
  Py_END_ALLOW_THREADS;
  if (error_type == nullptr) return y;
  Py_DECREF(y);
  PyErr_SetString(error_type, error.c_str());
  return nullptr;
}

}  // namespace eager

void add_eager(py::module_& m) {
  using py::arg;
  m.def(
      "use_tensor_types",
      [](py::handle tensor, py::handle parameter, py::handle watched) {
        const bool works = eager::use_tensor_types(tensor.ptr(), parameter.ptr(), watched.ptr());
        if (PyErr_Occurred() != nullptr) throw py::error_already_set();
        return works;
      },
      arg("tensor"), arg("parameter"), arg("watched"),
      "use_tensor_types(Tensor, Parameter, WatchedParameter) -> whether the eager calls can look into them.");
}

}  // namespace prunekern
