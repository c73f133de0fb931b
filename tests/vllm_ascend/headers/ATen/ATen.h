// Of torch's header of this name what this package's host code uses. The whole one takes twice as long to read, and
// tests/ascendc compiles the same code with that.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
