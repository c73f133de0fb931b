// Small kernels with one defect each, and the same kernels without it: `defects NAME` must fault, `defects NAME sound`
// must not. A third argument says how cross-core flags are counted. The emulator's checks are worth what they catch here.
#include <functional>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "kernel_operator.h"

namespace {

using namespace AscendC;
using ascendc_emulator::Storage;

constexpr uint32_t kCount = 256;

struct Buffers {
    GlobalTensor<float> in, out;
};

// One queue-driven copy, doubled on the way; the base that most defects are cut from.
struct Doubling {
    TPipe pipe;
    TQue<TPosition::VECIN, 1> input;
    TQue<TPosition::VECOUT, 1> output;
    Doubling() {
        pipe.InitBuffer(input, 1, kCount * sizeof(float));
        pipe.InitBuffer(output, 1, kCount * sizeof(float));
    }
    LocalTensor<float> load(const GlobalTensor<float> &from) {
        LocalTensor<float> x = input.AllocTensor<float>();
        DataCopy(x, from, kCount);
        input.EnQue(x);
        return input.DeQue<float>();
    }
    void store(const GlobalTensor<float> &to, LocalTensor<float> y) {
        output.EnQue(y);
        y = output.DeQue<float>();
        DataCopy(to, y, kCount);
        output.FreeTensor(y);
    }
};

void missing_barrier(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    Muls(y, x, 2.0f, static_cast<int32_t>(kCount));
    if (sound) PipeBarrier<PIPE_V>();
    Muls(y, y, 2.0f, static_cast<int32_t>(kCount));
    d.input.FreeTensor(x);
    d.store(b.out, y);
}

// Data arrives in a plain buffer; the vector unit has to be told.
void missing_flag(const Buffers &b, bool sound) {
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, kCount * sizeof(float));
    const LocalTensor<float> x = buffer.Get<float>();
    DataCopy(x, b.in, kCount);
    if (sound) {
        SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
        WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
    }
    Muls(x, x, 2.0f, static_cast<int32_t>(kCount));
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
    DataCopy(b.out, x, kCount);
}

// The result leaves while it is being computed.
void missing_flag_on_the_way_out(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    Muls(y, x, 2.0f, static_cast<int32_t>(kCount));
    if (sound) {
        d.store(b.out, y);
    } else {
        DataCopy(b.out, y, kCount);
    }
}

// The scalar unit reads what the vector unit may not have written yet.
void missing_flag_to_scalar(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    Muls(y, x, 2.0f, static_cast<int32_t>(kCount));
    if (sound) {
        SetFlag<HardEvent::V_S>(EVENT_ID0);
        WaitFlag<HardEvent::V_S>(EVENT_ID0);
    }
    if (y.GetValue(0) >= 0.0f) d.store(b.out, y);
}

// The next load overwrites a buffer that is still being read.
void missing_flag_before_reuse(const Buffers &b, bool sound) {
    TPipe pipe;
    TBuf<TPosition::VECCALC> in, out;
    pipe.InitBuffer(in, kCount * sizeof(float));
    pipe.InitBuffer(out, kCount * sizeof(float));
    const LocalTensor<float> x = in.Get<float>(), y = out.Get<float>();
    for (int round = 0; round < 2; ++round) {
        DataCopy(x, b.in, kCount);
        SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
        WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
        PipeBarrier<PIPE_V>();
        Muls(y, x, 2.0f, static_cast<int32_t>(kCount));
        if (sound) {
            SetFlag<HardEvent::V_MTE2>(EVENT_ID1);
            WaitFlag<HardEvent::V_MTE2>(EVENT_ID1);
        }
    }
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
    DataCopy(b.out, y, kCount);
}

void misaligned_copy(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.input.AllocTensor<float>();
    DataCopy(x, b.in, sound ? kCount : kCount - 3);  // 1012 bytes
}

void misaligned_address(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    Muls(y, x[sound ? 8 : 4], 2.0f, 64);
}

void ub_overflow(const Buffers &, bool sound) {
    TPipe pipe;
    TQue<TPosition::VECIN, 2> queue;
    pipe.InitBuffer(queue, 2, (sound ? 96 : 97) * 1024);
}

void gm_out_of_range(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    Muls(y, x, 2.0f, static_cast<int32_t>(kCount));
    GlobalTensor<float> out;
    out.SetGlobalBuffer(const_cast<float *>(b.out.address()));  // no size given: only the memory itself can tell
    d.store(out[sound ? 0 : 8], y);
}

void beyond_the_declared_size(const Buffers &b, bool sound) {
    Doubling d;
    GlobalTensor<float> in;
    in.SetGlobalBuffer(const_cast<float *>(b.in.address()), sound ? kCount : kCount - 8);
    LocalTensor<float> x = d.load(in);
    (void)x;
}

void local_out_of_range(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    Muls(y, x, 2.0f, static_cast<int32_t>(sound ? kCount : kCount + 8));
}

void use_after_free(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    if (!sound) d.input.FreeTensor(x);
    Muls(y, x, 2.0f, static_cast<int32_t>(kCount));
}

void no_free_buffer(const Buffers &, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.input.AllocTensor<float>();
    if (sound) {
        d.input.EnQue(x);
        x = d.input.DeQue<float>();
        d.input.FreeTensor(x);
    }
    x = d.input.AllocTensor<float>();
}

void uninitialised_read(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    Muls(y, x, 2.0f, static_cast<int32_t>(sound ? kCount : kCount / 2));
    d.store(b.out, y);
}

void event_never_set(const Buffers &, bool sound) {
    TPipe pipe;
    if (sound) SetFlag<HardEvent::MTE2_V>(EVENT_ID3);
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID3);
}

void event_left_set(const Buffers &, bool sound) {
    TPipe pipe;
    SetFlag<HardEvent::MTE2_V>(EVENT_ID3);
    if (sound) WaitFlag<HardEvent::MTE2_V>(EVENT_ID3);
}

// The vector cores write, the cube core reads.
void missing_cross_core_flag(const Buffers &b, bool sound) {
    if ASCEND_IS_AIV {
        Doubling d;
        LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
        Muls(y, x, 2.0f, static_cast<int32_t>(kCount));
        if (GetSubBlockIdx() == 0) {
            d.store(b.out, y);
        } else {
            d.output.FreeTensor(y);
        }
        CrossCoreSetFlag<2, PIPE_MTE3>(5);
    } else {
        TPipe pipe;
        TQue<TPosition::A1, 1> queue;
        pipe.InitBuffer(queue, 1, kCount * sizeof(float));
        LocalTensor<float> x = queue.AllocTensor<float>();
        if (sound) CrossCoreWaitFlag(5);
        DataCopy(x, b.out, kCount);
        if (!sound) CrossCoreWaitFlag(5);
    }
}

// The flag is set when the load is complete, not when the result is stored.
void flag_on_the_wrong_pipe(const Buffers &b, bool sound) {
    if ASCEND_IS_AIV {
        Doubling d;
        LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
        Muls(y, x, 2.0f, static_cast<int32_t>(kCount));
        if (GetSubBlockIdx() == 0) {
            d.store(b.out, y);
        } else {
            d.output.FreeTensor(y);
        }
        if (sound) {
            CrossCoreSetFlag<2, PIPE_MTE3>(5);
        } else {
            CrossCoreSetFlag<2, PIPE_MTE2>(5);
        }
    } else {
        TPipe pipe;
        TQue<TPosition::A1, 1> queue;
        pipe.InitBuffer(queue, 1, kCount * sizeof(float));
        LocalTensor<float> x = queue.AllocTensor<float>();
        CrossCoreWaitFlag(5);
        DataCopy(x, b.out, kCount);
    }
}

// Only one of the two vector cores reports.
void deadlock(const Buffers &, bool sound) {
    if ASCEND_IS_AIV {
        if (sound || GetSubBlockIdx() == 0) CrossCoreSetFlag<2, PIPE_MTE3>(1);
    } else {
        CrossCoreWaitFlag(1);
    }
}

void two_cores_write_the_same(const Buffers &b, bool sound) {
    if ASCEND_IS_AIC return;
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    Muls(y, x, 2.0f, static_cast<int32_t>(kCount));
    if (!sound || GetSubBlockIdx() == 0) d.store(b.out, y);
}

// One flag for two stages: where sets are only counted, the first core's second one passes for the second core's first.
void one_flag_for_two_stages(const Buffers &b, bool sound) {
    if ASCEND_IS_AIV {
        Doubling d;
        LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
        Muls(y, x, 2.0f, static_cast<int32_t>(kCount));
        d.input.FreeTensor(x);
        d.output.EnQue(y);
        y = d.output.DeQue<float>();
        constexpr uint32_t share = kCount / 2;
        DataCopy(b.out[static_cast<uint64_t>(GetSubBlockIdx()) * share], y, share);
        d.output.FreeTensor(y);
        CrossCoreSetFlag<2, PIPE_MTE3>(5);
        CrossCoreSetFlag<2, PIPE_MTE3>(sound ? 6 : 5);
    } else {
        TPipe pipe;
        TQue<TPosition::A1, 1> queue;
        pipe.InitBuffer(queue, 1, kCount * sizeof(float));
        LocalTensor<float> x = queue.AllocTensor<float>();
        CrossCoreWaitFlag(5);
        DataCopy(x, b.out, kCount);
        CrossCoreWaitFlag(sound ? 6 : 5);
    }
}

void flag_of_sync_all(const Buffers &, bool sound) {
    const uint16_t flag = sound ? 10 : 12;
    if ASCEND_IS_AIV {
        CrossCoreSetFlag<2, PIPE_MTE3>(flag);
    } else {
        CrossCoreWaitFlag(flag);
    }
}

void reserved_event(const Buffers &, bool sound) {
    TPipe pipe;
    const event_t id = sound ? EVENT_ID3 : EVENT_ID7;
    SetFlag<HardEvent::MTE2_V>(id);
    WaitFlag<HardEvent::MTE2_V>(id);
}

// The pipe of a cube core has set this event for itself.
void event_of_the_cube_pipe(const Buffers &, bool sound) {
    if ASCEND_IS_AIV return;
    TPipe pipe;
    const event_t id = sound ? EVENT_ID3 : EVENT_ID1;
    SetFlag<HardEvent::M_MTE1>(id);
    WaitFlag<HardEvent::M_MTE1>(id);
}

// What was set for the pipe is waited for by the kernel, and then the pipe waits for ever.
void event_stolen_from_the_cube_pipe(const Buffers &, bool sound) {
    if ASCEND_IS_AIV return;
    TPipe pipe;
    if (!sound) WaitFlag<HardEvent::M_MTE1>(EVENT_ID2);
}

// Three of the eight events are the pipe's.
void too_many_buffers_before_the_cube(const Buffers &, bool sound) {
    if ASCEND_IS_AIV return;
    TPipe pipe;
    TQue<TPosition::A2, 3> left;
    TQue<TPosition::B2, 3> right;
    pipe.InitBuffer(left, 3, 512);
    pipe.InitBuffer(right, sound ? 2 : 3, 512);
}

void signed_left_shift(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    if (sound) {
        ShiftLeft(y.ReinterpretCast<uint16_t>(), x.ReinterpretCast<uint16_t>(), static_cast<uint16_t>(8), 128);
    } else {
        ShiftLeft(y.ReinterpretCast<int16_t>(), x.ReinterpretCast<int16_t>(), static_cast<int16_t>(8), 128);
    }
}

// An addition that leaves int16 unless a limit comes first.
void overflow_of_a_lane(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    const LocalTensor<int16_t> lanes = y.ReinterpretCast<int16_t>();
    (void)x;
    Duplicate(lanes, static_cast<int16_t>(0x7FFF), 128);
    PipeBarrier<PIPE_V>();
    if (sound) Mins(lanes, lanes, static_cast<int16_t>(0x7E00), 128);
    PipeBarrier<PIPE_V>();
    Adds(lanes, lanes, static_cast<int16_t>(0x3F), 128);
}

void misaligned_narrow_source(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    Cast(y, x.ReinterpretCast<half>()[sound ? 16 : 8], RoundMode::CAST_NONE, 64);
}

void misaligned_broadcast(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    Brcb(y, x[sound ? 8 : 4], 1, BrcbRepeatParams(1, 8));
}

// A maximum may go to any float, but not across two.
void misaligned_maximum(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in), y = d.output.AllocTensor<float>();
    const LocalTensor<float> to = y.ReinterpretCast<int16_t>()[sound ? 2 : 1].ReinterpretCast<float>();
    WholeReduceMax<float>(to, x, 64, 1, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
}

void misaligned_scalar(const Buffers &b, bool sound) {
    Doubling d;
    LocalTensor<float> x = d.load(b.in);
    SetFlag<HardEvent::MTE2_S>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_S>(EVENT_ID0);
    x.ReinterpretCast<int16_t>()[sound ? 2 : 1].ReinterpretCast<float>().GetValue(0);
}

struct Defect {
    void (*kernel)(const Buffers &, bool);
    KernelType type;
};

const std::map<std::string, Defect> &defects() {
    static const std::map<std::string, Defect> table = {
        {"missing_barrier", {missing_barrier, KERNEL_TYPE_AIV_ONLY}},
        {"missing_flag", {missing_flag, KERNEL_TYPE_AIV_ONLY}},
        {"missing_flag_on_the_way_out", {missing_flag_on_the_way_out, KERNEL_TYPE_AIV_ONLY}},
        {"missing_flag_to_scalar", {missing_flag_to_scalar, KERNEL_TYPE_AIV_ONLY}},
        {"missing_flag_before_reuse", {missing_flag_before_reuse, KERNEL_TYPE_AIV_ONLY}},
        {"misaligned_copy", {misaligned_copy, KERNEL_TYPE_AIV_ONLY}},
        {"misaligned_address", {misaligned_address, KERNEL_TYPE_AIV_ONLY}},
        {"ub_overflow", {ub_overflow, KERNEL_TYPE_AIV_ONLY}},
        {"gm_out_of_range", {gm_out_of_range, KERNEL_TYPE_AIV_ONLY}},
        {"beyond_the_declared_size", {beyond_the_declared_size, KERNEL_TYPE_AIV_ONLY}},
        {"local_out_of_range", {local_out_of_range, KERNEL_TYPE_AIV_ONLY}},
        {"use_after_free", {use_after_free, KERNEL_TYPE_AIV_ONLY}},
        {"no_free_buffer", {no_free_buffer, KERNEL_TYPE_AIV_ONLY}},
        {"uninitialised_read", {uninitialised_read, KERNEL_TYPE_AIV_ONLY}},
        {"event_never_set", {event_never_set, KERNEL_TYPE_AIV_ONLY}},
        {"event_left_set", {event_left_set, KERNEL_TYPE_AIV_ONLY}},
        {"missing_cross_core_flag", {missing_cross_core_flag, KERNEL_TYPE_MIX_AIC_1_2}},
        {"flag_on_the_wrong_pipe", {flag_on_the_wrong_pipe, KERNEL_TYPE_MIX_AIC_1_2}},
        {"deadlock", {deadlock, KERNEL_TYPE_MIX_AIC_1_2}},
        {"two_cores_write_the_same", {two_cores_write_the_same, KERNEL_TYPE_MIX_AIC_1_2}},
        {"one_flag_for_two_stages", {one_flag_for_two_stages, KERNEL_TYPE_MIX_AIC_1_2}},
        {"flag_of_sync_all", {flag_of_sync_all, KERNEL_TYPE_MIX_AIC_1_2}},
        {"reserved_event", {reserved_event, KERNEL_TYPE_AIV_ONLY}},
        {"event_of_the_cube_pipe", {event_of_the_cube_pipe, KERNEL_TYPE_MIX_AIC_1_2}},
        {"event_stolen_from_the_cube_pipe", {event_stolen_from_the_cube_pipe, KERNEL_TYPE_MIX_AIC_1_2}},
        {"too_many_buffers_before_the_cube", {too_many_buffers_before_the_cube, KERNEL_TYPE_MIX_AIC_1_2}},
        {"signed_left_shift", {signed_left_shift, KERNEL_TYPE_AIV_ONLY}},
        {"overflow_of_a_lane", {overflow_of_a_lane, KERNEL_TYPE_AIV_ONLY}},
        {"misaligned_narrow_source", {misaligned_narrow_source, KERNEL_TYPE_AIV_ONLY}},
        {"misaligned_broadcast", {misaligned_broadcast, KERNEL_TYPE_AIV_ONLY}},
        {"misaligned_maximum", {misaligned_maximum, KERNEL_TYPE_AIV_ONLY}},
        {"misaligned_scalar", {misaligned_scalar, KERNEL_TYPE_AIV_ONLY}},
    };
    return table;
}

}  // namespace

int main(int count, char **values) {
    const std::string name = count > 1 ? values[1] : "";
    const auto found = defects().find(name);
    if (found == defects().end()) {
        std::cerr << "error no defect " << name << "\n";
        return 2;
    }
    const bool sound = count > 2 && std::string(values[2]) == "sound";
    std::vector<float> in(kCount, 1.5f), out(kCount);
    ascendc_emulator::Machine machine(ascendc_emulator::Chip::named("910B3"));
    machine.map("in", in.data(), in.size() * sizeof(float), Storage::input);
    machine.map("out", out.data(), out.size() * sizeof(float), Storage::output);
    try {
        if (count > 3) machine.flags = ascendc_emulator::counting_named(values[3]);
        machine.run(found->second.type, 1, [&] {
            Buffers buffers;
            buffers.in.SetGlobalBuffer(in.data(), kCount);
            buffers.out.SetGlobalBuffer(out.data(), kCount);
            found->second.kernel(buffers, sound);
        });
    } catch (const ascendc_emulator::Fault &fault) {
        std::cerr << "fault " << fault.name() << "\n" << fault.what() << "\n";
        return 3;
    }
    return 0;
}
