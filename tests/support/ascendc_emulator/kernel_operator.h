// Our own kernel_operator.h: the part of the Ascend C API that the kernels in csrc/ascend use, executed on the host.
//
// The API's names, signatures and semantics are those of the vendor's public documentation; the implementation is
// written from that documentation alone. README.md says what is checked, what is counted and what is not modelled.
#pragma once

#include <tuple>

#include "qualifiers.h"
#include "fault.h"
#include "numeric.h"
#include "chip.h"
#include "clock.h"
#include "counters.h"
#include "memory.h"
#include "core.h"
#include "machine.h"
#include "sync.h"
#include "tensor.h"
#include "queue.h"
#include "copy.h"
#include "vector_operations.h"
#include "cube.h"
