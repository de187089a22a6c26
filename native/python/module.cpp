// The extension module squat._native: what the CPU has, which kernels there are, and the engine.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdlib>
#include <string>

#include "base/cpu.h"
#include "bind.h"
#include "kernels/kernels.h"

namespace nb = nanobind;
namespace kernels = squat::kernels;

namespace {

nb::list cpu_features() {
  nb::list names;
  for (const std::string& name : squat::cpu_feature_names(squat::cpu_features()))
    names.append(name);
  return names;
}

nb::list kernel_table() {
  nb::list rows;
  for (const kernels::Kernel& kernel : kernels::table()) {
    nb::dict row;
    row["name"] = kernel.name;
    row["isa"] = kernel.isa;
    row["activation_bits"] = kernel.activation_bits;
    row["weights"] = kernels::name_of(kernel.weights);
    row["tile"] = nb::make_tuple(kernel.m, kernel.n, kernel.k);
    row["runs_here"] = kernels::runs_here(*kernels::find_isa(kernel.isa));
    rows.append(row);
  }
  return rows;
}

nb::dict chosen_kernels() {
  kernels::Choice choice;
  std::string error;
  if (!kernels::choose(std::getenv("SQUAT_ISA"), &choice, &error)) {
    const nb::object type = nb::module_::import_("squat.errors").attr("EngineError");
    PyErr_SetString(type.ptr(), error.c_str());
    throw nb::python_error();
  }
  nb::dict products;
  for (int activation_bits : {8, 4}) {
    for (const kernels::WeightForm weights : kernels::kWeightForms) {
      const std::string product =
          "a" + std::to_string(activation_bits) + " " + kernels::name_of(weights);
      products[product.c_str()] = kernels::explain(choice, activation_bits, weights);
    }
  }
  return products;
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "The C++ engine of Squat; use it through squat.Engine.";
  module.def("cpu_features", &cpu_features, "Names of the CPU features that kernels can use here.");
  module.def(
      "kernels", &kernel_table,
      "Every kernel that is compiled in: name, isa, activation_bits, weights ('w8', 'w4', or 't4': "
      "4 "
      "bits that stand for levels), tile (tokens, weight rows, codes of the inner dimension) and "
      "whether it runs on this CPU.");
  module.def("chosen_kernels", &chosen_kernels,
             "For each product, such as 'a4 w8' (activations and weights), the kernel that "
             "computes it and why. Obeys SQUAT_ISA, and raises EngineError if that names no ISA or "
             "one that this CPU lacks.");
  bind_engine(module);
}
