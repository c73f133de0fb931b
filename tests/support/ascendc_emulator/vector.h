// How the vector unit works on its lanes: masks, repeats, strides, arithmetic. The API's operations: vector_operations.h.
//
// A repeat works on up to 256 bytes of the widest operand. Within a repeat an operand's DataBlocks lie its block
// stride apart, successive repeats its repeat stride; both count DataBlocks of 32 bytes. Operations on `count`
// elements are contiguous repeats with a shorter last one.
#pragma once

#include <array>
#include <limits>
#include <tuple>
#include <type_traits>

#include "tensor.h"

namespace AscendC {

enum class RoundMode { CAST_NONE = 0, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };
enum class ReduceOrder { ORDER_VALUE_INDEX = 0, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };

struct UnaryRepeatParams {
    UnaryRepeatParams() = default;
    UnaryRepeatParams(uint16_t dst_block, uint16_t src_block, uint8_t dst_repeat, uint8_t src_repeat)
        : dstBlkStride(dst_block), srcBlkStride(src_block), dstRepStride(dst_repeat), srcRepStride(src_repeat) {}
    uint16_t dstBlkStride = 1;
    uint16_t srcBlkStride = 1;
    uint8_t dstRepStride = 8;
    uint8_t srcRepStride = 8;
};

struct BinaryRepeatParams {
    BinaryRepeatParams() = default;
    BinaryRepeatParams(uint8_t dst_block, uint8_t src0_block, uint8_t src1_block, uint8_t dst_repeat, uint8_t src0_repeat,
                       uint8_t src1_repeat)
        : dstBlkStride(dst_block), src0BlkStride(src0_block), src1BlkStride(src1_block), dstRepStride(dst_repeat),
          src0RepStride(src0_repeat), src1RepStride(src1_repeat) {}
    uint8_t dstBlkStride = 1;
    uint8_t src0BlkStride = 1;
    uint8_t src1BlkStride = 1;
    uint8_t dstRepStride = 8;
    uint8_t src0RepStride = 8;
    uint8_t src1RepStride = 8;
};

struct BrcbRepeatParams {
    BrcbRepeatParams() = default;
    BrcbRepeatParams(uint16_t dst_block, uint16_t dst_repeat) : dstRepStride(dst_repeat), dstBlkStride(dst_block) {}
    uint16_t dstRepStride = 8;
    uint16_t dstBlkStride = 1;
};

namespace vector_detail {

constexpr uint32_t kMaxLanes = 128;

template <class T>
constexpr uint32_t lanes_of_block() {
    return ascendc_emulator::kBlockBytes / static_cast<uint32_t>(sizeof(T));
}

// Where an operand lies: its tensor and its two strides in DataBlocks.
template <class T>
struct Operand {
    const LocalTensor<T> &tensor;
    uint32_t block_stride, repeat_stride;

    template <class Visit>
    void visit(uint32_t repeat, uint32_t lanes, Visit &&block) const {
        constexpr uint32_t width = lanes_of_block<T>();
        if (block_stride == 1) {  // one piece
            block(repeat * repeat_stride * ascendc_emulator::kBlockBytes, 0u, lanes);
            return;
        }
        for (uint32_t first = 0; first < lanes; first += width) {
            block((repeat * repeat_stride + first / width * block_stride) * ascendc_emulator::kBlockBytes, first,
                  std::min(width, lanes - first));
        }
    }
    void read(ascendc_emulator::Core &core, uint32_t repeat, uint32_t lanes, T *out) const {
        visit(repeat, lanes, [&](uint32_t byte, uint32_t first, uint32_t count) {
            const uint32_t length = count * static_cast<uint32_t>(sizeof(T));
            std::memcpy(out + first, tensor.at(core, byte, length, ascendc_emulator::Direction::read), length);
        });
    }
    void write(ascendc_emulator::Core &core, uint32_t repeat, uint32_t lanes, const T *in) const {
        visit(repeat, lanes, [&](uint32_t byte, uint32_t first, uint32_t count) {
            const uint32_t length = count * static_cast<uint32_t>(sizeof(T));
            std::memcpy(tensor.at(core, byte, length, ascendc_emulator::Direction::write), in + first, length);
        });
    }
};

inline void check_shape(const ascendc_emulator::Core &core, uint64_t mask, uint32_t lanes, uint32_t repeats) {
    using namespace ascendc_emulator;
    require(mask >= 1 && mask <= lanes, "bad-parameter",
            [&] { return core.where() + ": a mask of " + text(mask) + " of " + text(lanes) + " lanes"; });
    require(repeats <= kMaxRepeats, "bad-parameter", [&] { return core.where() + ": more than 255 repeats"; });
}

// Checks, then issues one vector instruction of `repeats` repeats.
template <class... Tensors>
ascendc_emulator::Core &begin(const char *name, double cycles_per_repeat, uint32_t repeats, const Tensors &...tensors) {
    using namespace ascendc_emulator;
    Core &core = current_core();
    core.instruction = name;
    core.current_pipe = PIPE_V;
    (tensors.require_in(core, core.ub), ...);
    (tensors.require_aligned(core), ...);
    // The hardware splits what exceeds its 8-bit repeat count.
    const uint32_t instructions = (repeats + kMaxRepeats - 1) / kMaxRepeats;
    core.counters.calls[name] += instructions - 1;
    core.counters.vector_repeats[name] += repeats;
    core.issue(PIPE_V, name, cycles_per_repeat * repeats, VectorCost::drain);
    return core;
}

// One result lane from one lane of every source.
template <class D, class F, class... S>
void elementwise(const char *name, double cycles, uint64_t mask, uint32_t repeats, F f, const Operand<D> &dst, const Operand<S> &...src) {
    constexpr size_t widest = std::max({sizeof(D), sizeof(S)...});
    constexpr uint32_t lanes = ascendc_emulator::kRepeatBytes / static_cast<uint32_t>(widest);
    if (repeats == 0) return;
    check_shape(ascendc_emulator::current_core(), mask, lanes, repeats);
    ascendc_emulator::Core &core = begin(name, cycles, repeats, dst.tensor, src.tensor...);
    const uint32_t active = static_cast<uint32_t>(mask);
    std::array<D, kMaxLanes> result;
    for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
        std::tuple<std::array<S, kMaxLanes>...> values;
        const auto load = [&](auto &...value) { (src.read(core, repeat, active, value.data()), ...); };
        std::apply(load, values);
        if constexpr (std::is_invocable_v<F, D, S...>) {  // accumulates into dst
            dst.read(core, repeat, active, result.data());
            std::apply([&](auto &...value) { for (uint32_t i = 0; i < active; ++i) result[i] = f(result[i], value[i]...); }, values);
        } else {
            std::apply([&](auto &...value) { for (uint32_t i = 0; i < active; ++i) result[i] = f(value[i]...); }, values);
        }
        dst.write(core, repeat, active, result.data());
    }
}

// The same on `count` contiguous elements.
template <class D, class F, class... S>
void contiguous(const char *name, double cycles, int64_t count, F f, const LocalTensor<D> &dst, const LocalTensor<S> &...src) {
    constexpr size_t widest = std::max({sizeof(D), sizeof(S)...});
    constexpr uint32_t lanes = ascendc_emulator::kRepeatBytes / static_cast<uint32_t>(widest);
    ascendc_emulator::require(count >= 0, "bad-parameter", [&] { return std::string(name) + " of a negative count"; });
    if (count == 0) return;
    const uint32_t total = static_cast<uint32_t>(count), repeats = (total + lanes - 1) / lanes;
    ascendc_emulator::Core &core = begin(name, cycles, repeats, dst, src...);
    const auto operand = [](const auto &tensor) {
        using T = typename std::decay_t<decltype(tensor)>::PrimType;
        return Operand<T>{tensor, 1, lanes / lanes_of_block<T>()};
    };
    std::array<D, kMaxLanes> result;
    for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
        const uint32_t active = std::min(lanes, total - repeat * lanes);
        std::tuple<std::array<S, kMaxLanes>...> values;
        std::apply([&](auto &...value) { (operand(src).read(core, repeat, active, value.data()), ...); }, values);
        if constexpr (std::is_invocable_v<F, D, S...>) {
            operand(dst).read(core, repeat, active, result.data());
            std::apply([&](auto &...value) { for (uint32_t i = 0; i < active; ++i) result[i] = f(result[i], value[i]...); }, values);
        } else {
            std::apply([&](auto &...value) { for (uint32_t i = 0; i < active; ++i) result[i] = f(value[i]...); }, values);
        }
        operand(dst).write(core, repeat, active, result.data());
    }
}

template <class T, class F>
void binary(const char *name, double cycles, F f, const LocalTensor<T> &dst, const LocalTensor<T> &src0, const LocalTensor<T> &src1,
            uint64_t mask, uint8_t repeats, const BinaryRepeatParams &p) {
    elementwise(name, cycles, mask, repeats, f, Operand<T>{dst, p.dstBlkStride, p.dstRepStride},
                Operand<T>{src0, p.src0BlkStride, p.src0RepStride}, Operand<T>{src1, p.src1BlkStride, p.src1RepStride});
}

template <class T, class F>
void unary(const char *name, double cycles, F f, const LocalTensor<T> &dst, const LocalTensor<T> &src, uint64_t mask, uint8_t repeats,
           const UnaryRepeatParams &p) {
    elementwise(name, cycles, mask, repeats, f, Operand<T>{dst, p.dstBlkStride, p.dstRepStride},
                Operand<T>{src, p.srcBlkStride, p.srcRepStride});
}

// NaN wins, as in the INF/NAN mode of the chips.
template <class T>
T larger(T a, T b) {
    if constexpr (std::is_floating_point_v<T> || std::is_same_v<T, half>) {
        if (a != a || b != b) return a != a ? a : b;
    }
    return a < b ? b : a;
}

template <class T>
T smaller(T a, T b) {
    if constexpr (std::is_floating_point_v<T> || std::is_same_v<T, half>) {
        if (a != a || b != b) return a != a ? a : b;
    }
    return b < a ? b : a;
}

[[noreturn]] inline void refuse_overflow() {
    throw ascendc_emulator::Fault("integer-overflow", ascendc_emulator::current_core().where() +
                                                          " leaves the range of its lanes: whether they wrap or saturate is not documented");
}

// Integer arithmetic in the width of the lane, without C++'s promotions.
template <class T, class F>
T in_lane(F f, T a, T b) {
    if constexpr (std::is_integral_v<T>) {
        const int64_t exact = f(static_cast<int64_t>(a), static_cast<int64_t>(b));
        if (exact < static_cast<int64_t>(std::numeric_limits<T>::min()) || exact > static_cast<int64_t>(std::numeric_limits<T>::max())) {
            refuse_overflow();
        }
        return static_cast<T>(exact);
    } else {
        return static_cast<T>(f(a, b));
    }
}

template <class T>
T magnitude(T x) {
    return x < T(0) || (x == T(0) && std::signbit(static_cast<float>(x))) ? static_cast<T>(-x) : x;
}

template <class T>
constexpr bool is_lane_of_bits = std::is_same_v<T, int16_t> || std::is_same_v<T, uint16_t>;

struct Sum {
    template <class T>
    T operator()(T a, T b) const { return in_lane<T>([](auto x, auto y) { return x + y; }, a, b); }
};
struct Difference {
    template <class T>
    T operator()(T a, T b) const { return in_lane<T>([](auto x, auto y) { return x - y; }, a, b); }
};
struct Product {
    template <class T>
    T operator()(T a, T b) const { return in_lane<T>([](auto x, auto y) { return x * y; }, a, b); }
};
struct Quotient {
    template <class T>
    T operator()(T a, T b) const { return static_cast<T>(a / b); }
};
struct Larger {
    template <class T>
    T operator()(T a, T b) const { return larger(a, b); }
};
struct Smaller {
    template <class T>
    T operator()(T a, T b) const { return smaller(a, b); }
};
struct BitAnd {
    template <class T>
    T operator()(T a, T b) const {
        static_assert(is_lane_of_bits<T>, "And takes int16_t or uint16_t on these chips");
        return static_cast<T>(a & b);
    }
};
struct BitOr {
    template <class T>
    T operator()(T a, T b) const {
        static_assert(is_lane_of_bits<T>, "Or takes int16_t or uint16_t on these chips");
        return static_cast<T>(a | b);
    }
};
[[noreturn]] inline void refuse_signed_shift() {
    throw ascendc_emulator::Fault("signed-shift", ascendc_emulator::current_core().where() +
                                                      " shifts signed lanes left: documented to keep the sign bit, measured not to;"
                                                      " shift them as uint16_t");
}
struct LeftShift {
    template <class T>
    T operator()(T a, T by) const {
        if constexpr (std::is_signed_v<T>) refuse_signed_shift();
        return static_cast<T>(static_cast<uint64_t>(a) << by);
    }
};
struct RightShift {  // arithmetic on signed lanes, logical on unsigned ones
    template <class T>
    T operator()(T a, T by) const { return static_cast<T>(a >> by); }
};

}  // namespace vector_detail

}  // namespace AscendC
