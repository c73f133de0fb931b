// Order within a core (PipeBarrier, SetFlag, WaitFlag) and between cores (CrossCoreSetFlag, CrossCoreWaitFlag).
#pragma once

#include "machine.h"

enum event_t : int { EVENT_ID0, EVENT_ID1, EVENT_ID2, EVENT_ID3, EVENT_ID4, EVENT_ID5, EVENT_ID6, EVENT_ID7 };

namespace AscendC {

using TEventID = int8_t;

// Source pipe in the tens, destination pipe in the ones.
enum class HardEvent : uint8_t {
    S_V = PIPE_S * 10 + PIPE_V,
    S_MTE2 = PIPE_S * 10 + PIPE_MTE2,
    S_MTE3 = PIPE_S * 10 + PIPE_MTE3,
    V_S = PIPE_V * 10 + PIPE_S,
    V_V = PIPE_V * 10 + PIPE_V,
    V_MTE2 = PIPE_V * 10 + PIPE_MTE2,
    V_MTE3 = PIPE_V * 10 + PIPE_MTE3,
    M_MTE1 = PIPE_M * 10 + PIPE_MTE1,
    M_FIX = PIPE_M * 10 + PIPE_FIX,
    MTE1_M = PIPE_MTE1 * 10 + PIPE_M,
    MTE1_MTE2 = PIPE_MTE1 * 10 + PIPE_MTE2,
    MTE2_S = PIPE_MTE2 * 10 + PIPE_S,
    MTE2_V = PIPE_MTE2 * 10 + PIPE_V,
    MTE2_MTE1 = PIPE_MTE2 * 10 + PIPE_MTE1,
    MTE2_MTE3 = PIPE_MTE2 * 10 + PIPE_MTE3,
    MTE3_S = PIPE_MTE3 * 10 + PIPE_S,
    MTE3_V = PIPE_MTE3 * 10 + PIPE_V,
    MTE3_MTE2 = PIPE_MTE3 * 10 + PIPE_MTE2,
    FIX_M = PIPE_FIX * 10 + PIPE_M,
};

template <pipe_t pipe>
inline void PipeBarrier() {
    ascendc_emulator::current_core().barrier(pipe);
}

template <HardEvent event>
inline void SetFlag(int32_t id) {
    using namespace ascendc_emulator;
    Core &core = current_core();
    require(id >= 0 && id < kEventIds, "flag-misuse", [&] { return core.label() + " sets an event out of 0..7"; });
    require(id < kFreeEventIds || core.allocated_events[{static_cast<int>(event), id}], "flag-misuse", [&] {
        return core.label() + " sets event " + text(static_cast<uint64_t>(id)) + ", which AllocEventID did not give; 6 and 7 are reserved";
    });
    auto &queue = core.events[{static_cast<int>(event), id}];
    require(queue.empty(), "flag-misuse",
            [&] { return core.label() + " sets an event that nothing has waited for since it was last set"; });
    queue.push_back(core.snapshot(static_cast<int>(event) / 10));
}

template <HardEvent event>
inline void WaitFlag(int32_t id) {
    using namespace ascendc_emulator;
    Core &core = current_core();
    auto &queue = core.events[{static_cast<int>(event), id}];
    require(!queue.empty(), "deadlock", [&] { return core.label() + " waits for an event that was never set"; });
    core.learn(static_cast<int>(event) % 10, queue.front());
    queue.pop_front();
}

template <uint8_t mode, pipe_t pipe>
inline void CrossCoreSetFlag(uint16_t flag) {
    ascendc_emulator::Core &core = ascendc_emulator::current_core();
    core.machine.set_flag(core, mode, pipe, flag);
}

template <uint8_t mode = 0, pipe_t pipe = PIPE_S>
inline void CrossCoreWaitFlag(uint16_t flag) {
    ascendc_emulator::Core &core = ascendc_emulator::current_core();
    core.machine.wait_flag(core, flag);
}

inline int64_t GetBlockNum() { return ascendc_emulator::current_core().machine.blocks; }

// On a mixed kernel's vector core this is the index among all vector cores, on a cube core among cube cores.
inline int64_t GetBlockIdx() {
    const ascendc_emulator::Core &core = ascendc_emulator::current_core();
    return core.is_cube() ? core.group : static_cast<int64_t>(core.group) * ascendc_emulator::kSubBlocks + core.sub;
}

inline int64_t GetSubBlockNum() {
    return ascendc_emulator::current_core().machine.type == KERNEL_TYPE_MIX_AIC_1_2 ? ascendc_emulator::kSubBlocks : 1;
}

inline int64_t GetSubBlockIdx() {
    const ascendc_emulator::Core &core = ascendc_emulator::current_core();
    return core.machine.type == KERNEL_TYPE_MIX_AIC_1_2 ? core.sub : 0;
}

}  // namespace AscendC
