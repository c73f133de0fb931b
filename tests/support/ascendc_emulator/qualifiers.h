// Language extensions of the Ascend C compiler, as far as the kernels use them. They are macros because they
// stand where keywords stand in device code.
#pragma once

#include <cstdint>

#define __global__
#define __aicore__
#define __gm__

using GM_ADDR = uint8_t *;

enum pipe_t : int { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_FIX, PIPE_ALL };

// One binary holds both programs on the device; here the running core decides.
#define ASCEND_IS_AIC (::ascendc_emulator::current_core().is_cube())
#define ASCEND_IS_AIV (!::ascendc_emulator::current_core().is_cube())

// The kernel type (which cores take part) is given to the launch here; the device compiler reads this line.
#define KERNEL_TASK_TYPE_DEFAULT(kind) ::ascendc_emulator::current_core().declare_kernel_type(::AscendC::kind)
