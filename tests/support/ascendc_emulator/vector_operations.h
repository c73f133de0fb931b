// The operations of the vector unit that the kernels use: arithmetic, conversion, broadcast, reduction.
#pragma once

#include "vector.h"

namespace AscendC {

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
    require(static_cast<uint32_t>(mask) == lanes, "unsupported", [&] { return std::string(name) + " with a partial mask"; });
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
