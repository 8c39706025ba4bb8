// attn_ext._C: importing it registers the operators (bindings/ops.cpp) and chooses the instruction set; its functions
// tell and change that choice.  Limited API of Python 3.10: one binary serves every later version.
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <torch/headeronly/version.h>

#include <cstdlib>
#include <string>

#include "cpu/kernel_table.h"
#include "cuda/build.h"

#ifdef __clang__
#define COMPILER_NAME ""  // __VERSION__ says it
#else
#define COMPILER_NAME "GCC "
#endif

namespace {

using attn_ext::cpu::Isa;
namespace cpu = attn_ext::cpu;
namespace cuda = attn_ext::cuda;

constexpr const char* kIsaVariable = "ATTN_EXT_ISA";

std::string isa_list(bool (*includes)(Isa)) {
  std::string names;
  for (int i = 0; i < cpu::kIsaCount; ++i)
    if (includes(static_cast<Isa>(i))) names += (names.empty() ? "" : ", ") + std::string(cpu::isa_name(static_cast<Isa>(i)));
  return names;
}

// False with a ValueError set when there is no such instruction set.
bool isa_from_name(const char* name, const char* argument, Isa* isa) {
  if (cpu::isa_from_name(name, isa)) return true;
  PyErr_Format(PyExc_ValueError, "%s must be one of %s, got '%s' (this machine supports %s)", argument,
               isa_list([](Isa) { return true; }).c_str(), name, isa_list(cpu::isa_supported).c_str());
  return false;
}

// False with a ValueError set when it cannot be used.
bool select(const char* name, const char* argument) {
  Isa isa;
  if (!isa_from_name(name, argument, &isa)) return false;
  if (cpu::isa_select(isa)) return true;
  PyErr_Format(PyExc_ValueError, "%s is '%s', which %s (supported: %s)", argument, name,
               cpu::isa_compiled(isa) ? "this machine does not support" : "is not compiled into this build",
               isa_list(cpu::isa_supported).c_str());
  return false;
}

const char* name_argument(PyObject* argument) {
  if (!PyUnicode_Check(argument)) {
    PyErr_SetString(PyExc_TypeError, "name must be a str");
    return nullptr;
  }
  return PyUnicode_AsUTF8AndSize(argument, nullptr);
}

PyObject* isa_names(PyObject*, PyObject*) {
  PyObject* names = PyTuple_New(cpu::kIsaCount);
  for (int i = 0; names && i < cpu::kIsaCount; ++i) {
    PyObject* name = PyUnicode_FromString(cpu::isa_name(static_cast<Isa>(i)));
    if (!name || PyTuple_SetItem(names, i, name) < 0) Py_CLEAR(names);
  }
  return names;
}

template <bool (*Predicate)(Isa)>
PyObject* isa_predicate(PyObject*, PyObject* argument) {
  const char* name = name_argument(argument);
  Isa isa;
  if (!name || !isa_from_name(name, "name", &isa)) return nullptr;
  return PyBool_FromLong(Predicate(isa));
}

PyObject* isa_current(PyObject*, PyObject*) { return PyUnicode_FromString(cpu::isa_name(cpu::isa_current())); }

PyObject* isa_select(PyObject*, PyObject* argument) {
  const char* name = name_argument(argument);
  if (!name || !select(name, "name")) return nullptr;
  Py_RETURN_NONE;
}

// "13.0", or None; and the compute capabilities, like "9.0".
PyObject* cuda_version() {
  if (!&cuda::kBuild) Py_RETURN_NONE;
  return PyUnicode_FromFormat("%d.%d", cuda::kBuild.major, cuda::kBuild.minor);
}

PyObject* cuda_archs() {
  Py_ssize_t count = 0;
  while (&cuda::kBuild && count < cuda::Build::kMaxArchs && cuda::kBuild.archs[count]) ++count;
  PyObject* archs = PyTuple_New(count);
  for (Py_ssize_t i = 0; archs && i < count; ++i) {
    const int arch = cuda::kBuild.archs[i] / 10;
    PyObject* name = PyUnicode_FromFormat("%d.%d", arch / 10, arch % 10);
    if (!name || PyTuple_SetItem(archs, i, name) < 0) Py_CLEAR(archs);
  }
  return archs;
}

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:l,s:N,s:N}", "torch", TORCH_VERSION, "compiler", COMPILER_NAME __VERSION__,
                       "cxx_standard", static_cast<long>(__cplusplus), "cuda", cuda_version(), "cuda_archs", cuda_archs());
}

PyMethodDef methods[] = {
    {"isa_names", isa_names, METH_NOARGS, "isa_names() -> tuple[str, ...]: every instruction set, in rising order."},
    {"isa_compiled", isa_predicate<cpu::isa_compiled>, METH_O, "isa_compiled(name) -> bool: is it in this build?"},
    {"isa_supported", isa_predicate<cpu::isa_supported>, METH_O, "isa_supported(name) -> bool: can it be selected?"},
    {"isa_current", isa_current, METH_NOARGS, "isa_current() -> str: the one in use."},
    {"isa_select", isa_select, METH_O,
     "isa_select(name): use it from now on, in all threads.\n\nRaises ValueError if it is unknown or unsupported."},
    {"build_info", build_info, METH_NOARGS, "build_info() -> dict: what this extension was built with."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_def = {.m_base = PyModuleDef_HEAD_INIT,
                          .m_name = "_C",
                          .m_doc = "The compiled part of attn_ext.",
                          .m_size = -1,
                          .m_methods = methods,
                          .m_slots = nullptr,
                          .m_traverse = nullptr,
                          .m_clear = nullptr,
                          .m_free = nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  const char* isa = std::getenv(kIsaVariable);
  if (isa && *isa && !select(isa, kIsaVariable)) return nullptr;
  return PyModule_Create(&module_def);
}
