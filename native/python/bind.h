// The parts of the extension module squat._native.
#pragma once

#include <nanobind/nanobind.h>

// The classes Engine and Sampler, over the C interface.
void bind_engine(nanobind::module_& module);
