// The vector unit: masks, repeats, strides, and the operations that the kernels use.
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
            core.where() + ": a mask of " + text(mask) + " of " + text(lanes) + " lanes");
    require(repeats <= kMaxRepeats, "bad-parameter", core.where() + ": more than 255 repeats");
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
    ascendc_emulator::require(count >= 0, "bad-parameter", std::string(name) + " of a negative count");
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

using ascendc_emulator::VectorCost;

// Macros, because each line defines a name of the API, with both of its overloads.
// --- two operands -------------------------------------------------------------------------------------------
#define ASCENDC_EMULATOR_BINARY(Name, cost, Operation)                                                               \
    template <class T>                                                                                               \
    void Name(const LocalTensor<T> &dst, const LocalTensor<T> &src0, const LocalTensor<T> &src1,                     \
              const int32_t &count) {                                                                                \
        vector_detail::contiguous(#Name, cost, count, vector_detail::Operation(), dst, src0, src1);                  \
    }                                                                                                                \
    template <class T, bool isSetMask = true>                                                                        \
    void Name(const LocalTensor<T> &dst, const LocalTensor<T> &src0, const LocalTensor<T> &src1, uint64_t mask,      \
              const uint8_t repeatTime, const BinaryRepeatParams &params) {                                          \
        vector_detail::binary(#Name, cost, vector_detail::Operation(), dst, src0, src1, mask, repeatTime, params);   \
    }

ASCENDC_EMULATOR_BINARY(Add, VectorCost::two_operands, Sum)
ASCENDC_EMULATOR_BINARY(Sub, VectorCost::two_operands, Difference)
ASCENDC_EMULATOR_BINARY(Mul, VectorCost::two_operands, Product)
ASCENDC_EMULATOR_BINARY(Div, VectorCost::divide, Quotient)
ASCENDC_EMULATOR_BINARY(Max, VectorCost::two_operands, Larger)
ASCENDC_EMULATOR_BINARY(Min, VectorCost::two_operands, Smaller)
ASCENDC_EMULATOR_BINARY(And, VectorCost::two_operands, BitAnd)
ASCENDC_EMULATOR_BINARY(Or, VectorCost::two_operands, BitOr)
#undef ASCENDC_EMULATOR_BINARY

// --- one operand and a scalar ---------------------------------------------------------------------------------
#define ASCENDC_EMULATOR_SCALAR(Name, Operation)                                                                     \
    template <class T, bool isSetMask = true>                                                                        \
    void Name(const LocalTensor<T> &dst, const LocalTensor<T> &src, const T &scalarValue, const int32_t &count) {    \
        const auto f = [s = scalarValue](T a) { return vector_detail::Operation()(a, s); };                          \
        vector_detail::contiguous(#Name, VectorCost::one_operand, count, f, dst, src);                               \
    }                                                                                                                \
    template <class T, bool isSetMask = true>                                                                        \
    void Name(const LocalTensor<T> &dst, const LocalTensor<T> &src, const T &scalarValue, uint64_t mask,             \
              const uint8_t repeatTime, const UnaryRepeatParams &params) {                                           \
        const auto f = [s = scalarValue](T a) { return vector_detail::Operation()(a, s); };                          \
        vector_detail::unary(#Name, VectorCost::one_operand, f, dst, src, mask, repeatTime, params);                 \
    }

ASCENDC_EMULATOR_SCALAR(Adds, Sum)
ASCENDC_EMULATOR_SCALAR(Muls, Product)
ASCENDC_EMULATOR_SCALAR(Maxs, Larger)
ASCENDC_EMULATOR_SCALAR(Mins, Smaller)
ASCENDC_EMULATOR_SCALAR(ShiftLeft, LeftShift)
ASCENDC_EMULATOR_SCALAR(ShiftRight, RightShift)
#undef ASCENDC_EMULATOR_SCALAR

template <class T>
void Abs(const LocalTensor<T> &dst, const LocalTensor<T> &src, const int32_t &count) {
    vector_detail::contiguous("Abs", VectorCost::one_operand, count, [](T a) { return vector_detail::magnitude(a); }, dst, src);
}

template <class T>
void Duplicate(const LocalTensor<T> &dst, const T &scalarValue, const int32_t &count) {
    const T value = scalarValue;
    vector_detail::contiguous("Duplicate", VectorCost::duplicate, count, [value] { return value; }, dst);
}

template <class T, bool isSetMask = true>
void Duplicate(const LocalTensor<T> &dst, const T &scalarValue, uint64_t mask, const uint8_t repeatTime, const uint16_t dstBlockStride,
               const uint8_t dstRepeatStride) {
    const T value = scalarValue;
    vector_detail::elementwise("Duplicate", VectorCost::duplicate, mask, repeatTime, [value] { return value; },
                               vector_detail::Operand<T>{dst, dstBlockStride, dstRepeatStride});
}

// --- multiply and add into the destination ---------------------------------------------------------------------
// With half sources and a float destination the products are those of float, and a repeat has 64 lanes.
template <class T, class U>
void MulAddDst(const LocalTensor<T> &dst, const LocalTensor<U> &src0, const LocalTensor<U> &src1, const int32_t &count) {
    vector_detail::contiguous("MulAddDst", VectorCost::multiply_add, count,
                              [](T d, U a, U b) { return static_cast<T>(static_cast<T>(a) * static_cast<T>(b) + d); }, dst, src0, src1);
}

template <class T, class U, bool isSetMask = true>
void MulAddDst(const LocalTensor<T> &dst, const LocalTensor<U> &src0, const LocalTensor<U> &src1, uint64_t mask, const uint8_t repeatTime,
               const BinaryRepeatParams &p) {
    vector_detail::elementwise("MulAddDst", VectorCost::multiply_add, mask, repeatTime,
                               [](T d, U a, U b) { return static_cast<T>(static_cast<T>(a) * static_cast<T>(b) + d); },
                               vector_detail::Operand<T>{dst, p.dstBlkStride, p.dstRepStride},
                               vector_detail::Operand<U>{src0, p.src0BlkStride, p.src0RepStride},
                               vector_detail::Operand<U>{src1, p.src1BlkStride, p.src1RepStride});
}

template <class T, class U>
void Axpy(const LocalTensor<T> &dst, const LocalTensor<U> &src, const U &scalarValue, const int32_t &count) {
    const T s = static_cast<T>(scalarValue);
    vector_detail::contiguous("Axpy", VectorCost::multiply_add, count,
                              [s](T d, U a) { return static_cast<T>(static_cast<T>(a) * s + d); }, dst, src);
}

// --- conversion --------------------------------------------------------------------------------------------------
namespace vector_detail {

template <class T, class U>
T convert(U x, RoundMode mode) {
    using namespace ascendc_emulator;
    const auto reject = [mode]() -> T {
        throw Fault("unsupported", current_core().where() + " with rounding mode " + std::to_string(static_cast<int>(mode)));
    };
    const bool nearest = mode == RoundMode::CAST_RINT || mode == RoundMode::CAST_NONE;
    if constexpr (std::is_same_v<T, float>) {
        static_assert(std::is_same_v<U, half> || std::is_same_v<U, bfloat16_t>);
        return mode == RoundMode::CAST_NONE ? widen(x) : reject();
    } else if constexpr (std::is_same_v<U, float> && std::is_same_v<T, half>) {
        if (nearest) return to_half_nearest_even(x);
        if (mode == RoundMode::CAST_ODD) return to_half_odd(x);
        return mode == RoundMode::CAST_TRUNC ? to_half_toward_zero(x) : reject();
    } else if constexpr (std::is_same_v<U, float> && std::is_same_v<T, bfloat16_t>) {
        return mode == RoundMode::CAST_RINT ? to_bfloat16_nearest_even(x) : reject();
    } else if constexpr (std::is_same_v<U, int16_t> && std::is_same_v<T, half>) {
        return nearest ? static_cast<half>(x) : reject();
    } else {
        static_assert(std::is_same_v<U, half> && std::is_same_v<T, uint8_t>, "this Cast is not emulated");
        if (!nearest) return reject();
        const float rounded = std::nearbyint(widen(x));
        return static_cast<uint8_t>(std::fmin(std::fmax(rounded, 0.0f), 255.0f));  // saturates; NaN gives 0
    }
}

}  // namespace vector_detail

template <class T, class U>
void Cast(const LocalTensor<T> &dst, const LocalTensor<U> &src, const RoundMode &roundMode, const uint32_t count) {
    const RoundMode mode = roundMode;
    vector_detail::contiguous("Cast", VectorCost::cast, count, [mode](U x) { return vector_detail::convert<T, U>(x, mode); }, dst, src);
}

template <class T, class U, bool isSetMask = true>
void Cast(const LocalTensor<T> &dst, const LocalTensor<U> &src, const RoundMode &roundMode, const uint64_t mask,
          const uint8_t repeatTime, const UnaryRepeatParams &p) {
    const RoundMode mode = roundMode;
    vector_detail::elementwise("Cast", VectorCost::cast, mask, repeatTime, [mode](U x) { return vector_detail::convert<T, U>(x, mode); },
                               vector_detail::Operand<T>{dst, p.dstBlkStride, p.dstRepStride},
                               vector_detail::Operand<U>{src, p.srcBlkStride, p.srcRepStride});
}

// --- broadcast and reduction -----------------------------------------------------------------------------------
// Each of 8 elements a repeat fills one DataBlock.
template <class T>
void Brcb(const LocalTensor<T> &dst, const LocalTensor<T> &src, const uint8_t repeatTime, const BrcbRepeatParams &p) {
    using namespace ascendc_emulator;
    if (repeatTime == 0) return;
    Core &core = vector_detail::begin("Brcb", VectorCost::broadcast, repeatTime, dst, src);
    std::array<T, vector_detail::lanes_of_block<T>()> block;
    for (uint32_t repeat = 0; repeat < repeatTime; ++repeat) {
        for (uint32_t i = 0; i < 8; ++i) {
            T value;
            std::memcpy(&value, src.at(core, (repeat * 8 + i) * static_cast<uint32_t>(sizeof(T)), sizeof(T), Direction::read), sizeof(T));
            block.fill(value);
            const uint32_t place = (repeat * p.dstRepStride + i * p.dstBlkStride) * kBlockBytes;
            std::memcpy(dst.at(core, place, kBlockBytes, Direction::write), block.data(), kBlockBytes);
        }
    }
}

// The largest of each repeat. Only values are emulated; then successive results lie `dstRepStride` elements apart.
template <class T, bool isSetMask = true>
void WholeReduceMax(const LocalTensor<T> &dst, const LocalTensor<T> &src, const int32_t mask, const int32_t repeatTime,
                    const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride,
                    ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {
    using namespace ascendc_emulator;
    require(order == ReduceOrder::ORDER_ONLY_VALUE, "unsupported", "WholeReduceMax with indices");
    if (repeatTime == 0) return;
    vector_detail::check_shape(current_core(), static_cast<uint64_t>(mask), kRepeatBytes / sizeof(T), static_cast<uint32_t>(repeatTime));
    Core &core = vector_detail::begin("WholeReduceMax", VectorCost::reduce_repeat, static_cast<uint32_t>(repeatTime), src);
    dst.require_in(core, core.ub);
    dst.require_aligned(core, sizeof(T));  // the one result that need not start a DataBlock
    const vector_detail::Operand<T> operand{src, static_cast<uint32_t>(srcBlkStride), static_cast<uint32_t>(srcRepStride)};
    std::array<T, vector_detail::kMaxLanes> values;
    for (int32_t repeat = 0; repeat < repeatTime; ++repeat) {
        operand.read(core, static_cast<uint32_t>(repeat), static_cast<uint32_t>(mask), values.data());
        T best = values[0];
        for (int32_t i = 1; i < mask; ++i) best = vector_detail::larger(best, values[static_cast<size_t>(i)]);
        const uint32_t place = static_cast<uint32_t>(repeat * dstRepStride) * static_cast<uint32_t>(sizeof(T));
        std::memcpy(dst.at(core, place, sizeof(T), Direction::write), &best, sizeof(T));
    }
}

namespace vector_detail {

// Sums of neighbouring groups of `width` lanes; a repeat's results lie together.
template <class T>
void group_sums(const char *name, uint32_t width, const LocalTensor<T> &dst, const LocalTensor<T> &src, int32_t repeats, int32_t mask,
                int32_t dst_stride, int32_t src_block, int32_t src_repeat) {
    using namespace ascendc_emulator;
    constexpr uint32_t lanes = kRepeatBytes / sizeof(T);
    if (repeats == 0) return;
    check_shape(current_core(), static_cast<uint64_t>(mask), lanes, static_cast<uint32_t>(repeats));
    require(static_cast<uint32_t>(mask) == lanes, "unsupported", std::string(name) + " with a partial mask");
    Core &core = begin(name, VectorCost::reduce_block, static_cast<uint32_t>(repeats), dst, src);
    const Operand<T> operand{src, static_cast<uint32_t>(src_block), static_cast<uint32_t>(src_repeat)};
    const uint32_t results = lanes / width, bytes = results * static_cast<uint32_t>(sizeof(T));
    std::array<T, kMaxLanes> values, sums;
    for (int32_t repeat = 0; repeat < repeats; ++repeat) {
        operand.read(core, static_cast<uint32_t>(repeat), lanes, values.data());
        for (uint32_t i = 0; i < results; ++i) {
            for (uint32_t step = width; step > 1; step /= 2) {  // a tree, as the vendor documents for its reductions
                T *group = &values[i * width];
                for (uint32_t j = 0; j < step / 2; ++j) group[j] = group[2 * j] + group[2 * j + 1];
            }
            sums[i] = values[i * width];
        }
        std::memcpy(dst.at(core, static_cast<uint32_t>(repeat * dst_stride) * bytes, bytes, Direction::write), sums.data(), bytes);
    }
}

}  // namespace vector_detail

template <class T, bool isSetMask = true>
void BlockReduceSum(const LocalTensor<T> &dst, const LocalTensor<T> &src, const int32_t repeatTime, const int32_t mask,
                    const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride) {
    vector_detail::group_sums("BlockReduceSum", vector_detail::lanes_of_block<T>(), dst, src, repeatTime, mask, dstRepStride, srcBlkStride, srcRepStride);
}

template <class T, bool isSetMask = true>
void PairReduceSum(const LocalTensor<T> &dst, const LocalTensor<T> &src, const int32_t repeatTime, const int32_t mask,
                   const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride) {
    vector_detail::group_sums("PairReduceSum", 2, dst, src, repeatTime, mask, dstRepStride, srcBlkStride, srcRepStride);
}

}  // namespace AscendC
