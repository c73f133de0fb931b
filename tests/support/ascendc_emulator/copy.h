// Transfers between global memory and a core: DataCopy, DataCopyPad, and the ND to NZ conversion on the way to L1.
#pragma once

#include "tensor.h"

namespace AscendC {

struct DataCopyParams {
    DataCopyParams() = default;
    DataCopyParams(uint16_t count, uint16_t length, uint16_t source_gap, uint16_t destination_gap)
        : blockCount(count), blockLen(length), srcStride(source_gap), dstStride(destination_gap) {}
    uint16_t blockCount = 1;
    uint16_t blockLen = 0;   // DataBlocks
    uint16_t srcStride = 0;  // DataBlocks between the end of one burst and the start of the next
    uint16_t dstStride = 0;
};

struct DataCopyExtParams {
    DataCopyExtParams() = default;
    DataCopyExtParams(uint16_t count, uint32_t length, uint32_t source_gap, uint32_t destination_gap, uint32_t reserved)
        : blockCount(count), blockLen(length), srcStride(source_gap), dstStride(destination_gap), rsv(reserved) {}
    uint16_t blockCount = 1;
    uint32_t blockLen = 0;   // bytes
    uint32_t srcStride = 0;  // a gap: bytes in global memory, DataBlocks on the core
    uint32_t dstStride = 0;
    uint32_t rsv = 0;
};

template <class T>
struct DataCopyPadExtParams {
    DataCopyPadExtParams() = default;
    DataCopyPadExtParams(bool pad, uint8_t left, uint8_t right, T value)
        : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
    bool isPad = false;
    uint8_t leftPadding = 0;
    uint8_t rightPadding = 0;
    T paddingValue = {};
};

struct Nd2NzParams {
    Nd2NzParams() = default;
    Nd2NzParams(uint16_t matrices, uint16_t rows, uint16_t columns, uint16_t source_matrix_stride, uint16_t source_row_stride,
                uint16_t c0_stride, uint16_t n_stride, uint16_t matrix_stride)
        : ndNum(matrices), nValue(rows), dValue(columns), srcNdMatrixStride(source_matrix_stride), srcDValue(source_row_stride),
          dstNzC0Stride(c0_stride), dstNzNStride(n_stride), dstNzMatrixStride(matrix_stride) {}
    uint16_t ndNum = 0;
    uint16_t nValue = 0;
    uint16_t dValue = 0;
    uint16_t srcNdMatrixStride = 0;
    uint16_t srcDValue = 0;
    uint16_t dstNzC0Stride = 0;
    uint16_t dstNzNStride = 0;
    uint16_t dstNzMatrixStride = 0;
};

}  // namespace AscendC

namespace ascendc_emulator {

// A transfer from or to global memory: order, cost and byte counts. The data moves row by row afterwards.
inline void issue_load(Core &core, const char *name, const GlobalBuffer &buffer, double bytes) {
    const LocalMemory &memory = core.is_cube() ? core.l1 : core.ub;
    core.counters.bytes[std::string(buffer.streamed ? "HBM->" : "L2->") + memory.name] += static_cast<uint64_t>(bytes);
    core.issue(PIPE_MTE2, name, core.machine.gm_cycles(core, buffer, bytes, Direction::read), PathCost::gm_latency);
}

inline void issue_store(Core &core, const char *name, const GlobalBuffer &buffer, double bytes) {
    core.counters.bytes[std::string(core.is_cube() ? "L0C" : "UB") + "->L2"] += static_cast<uint64_t>(bytes);
    core.issue(core.is_cube() ? PIPE_FIX : PIPE_MTE3, name, core.machine.gm_cycles(core, buffer, bytes, Direction::write),
               PathCost::gm_latency);
}

}  // namespace ascendc_emulator

namespace AscendC {

namespace copy_detail {

// Both directions of every transfer whose local side is in DataBlocks; `lengths` in bytes.
template <class T>
void load(const char *name, const LocalTensor<T> &to, const GlobalTensor<T> &from, uint32_t count, uint32_t length,
          uint64_t from_step, uint64_t to_step, uint32_t fill, const T *fill_value) {
    using namespace ascendc_emulator;
    if (count == 0 || length == 0) return;
    Core &core = current_core();
    core.instruction = name;
    to.require_aligned(core);
    require(length % sizeof(T) == 0 && from_step % sizeof(T) == 0, "misaligned",
            [&] { return core.where() + ": a length or a step is not a whole number of elements"; });
    issue_load(core, name, *core.machine.buffer_of(core, from), static_cast<double>(count) * length);
    for (uint32_t i = 0; i < count; ++i) {
        const T *source = from.touch(core, i * from_step / sizeof(T), length / sizeof(T), Direction::read).first;
        uint8_t *target = to.at(core, static_cast<uint32_t>(i * to_step), length + fill, Direction::write);
        std::memcpy(target, source, length);
        for (uint32_t b = 0; b < fill; b += static_cast<uint32_t>(sizeof(T))) std::memcpy(target + length + b, fill_value, sizeof(T));
    }
}

template <class T>
void store(const char *name, const GlobalTensor<T> &to, const LocalTensor<T> &from, uint32_t count, uint32_t length,
           uint64_t to_step, uint64_t from_step) {
    using namespace ascendc_emulator;
    if (count == 0 || length == 0) return;
    Core &core = current_core();
    core.instruction = name;
    from.require_aligned(core);
    require(length % sizeof(T) == 0 && to_step % sizeof(T) == 0, "misaligned",
            [&] { return core.where() + ": a length or a step is not a whole number of elements"; });
    issue_store(core, name, *core.machine.buffer_of(core, to), static_cast<double>(count) * length);
    for (uint32_t i = 0; i < count; ++i) {
        const uint8_t *source = from.at(core, static_cast<uint32_t>(i * from_step), length, Direction::read);
        T *target = to.touch(core, i * to_step / sizeof(T), length / sizeof(T), Direction::write).first;
        std::memcpy(target, source, length);
    }
}

inline void require_blocks(uint64_t bytes) {
    using namespace ascendc_emulator;
    require(bytes % kBlockBytes == 0, "misaligned", [&] {
        return current_core().label() + ": DataCopy of " + text(bytes) + " bytes, which is not a multiple of 32 (DataCopyPad can)";
    });
}

}  // namespace copy_detail

template <class T>
void DataCopy(const LocalTensor<T> &dst, const GlobalTensor<T> &src, const uint32_t count) {
    copy_detail::require_blocks(static_cast<uint64_t>(count) * sizeof(T));
    copy_detail::load<T>("DataCopy", dst, src, 1, count * static_cast<uint32_t>(sizeof(T)), 0, 0, 0, nullptr);
}

template <class T>
void DataCopy(const GlobalTensor<T> &dst, const LocalTensor<T> &src, const uint32_t count) {
    copy_detail::require_blocks(static_cast<uint64_t>(count) * sizeof(T));
    copy_detail::store<T>("DataCopy", dst, src, 1, count * static_cast<uint32_t>(sizeof(T)), 0, 0);
}

template <class T>
void DataCopy(const LocalTensor<T> &dst, const GlobalTensor<T> &src, const DataCopyParams &p) {
    constexpr uint32_t block = ascendc_emulator::kBlockBytes;
    copy_detail::load<T>("DataCopy", dst, src, p.blockCount, p.blockLen * block, (uint64_t(p.blockLen) + p.srcStride) * block,
                         (uint64_t(p.blockLen) + p.dstStride) * block, 0, nullptr);
}

template <class T>
void DataCopy(const GlobalTensor<T> &dst, const LocalTensor<T> &src, const DataCopyParams &p) {
    constexpr uint32_t block = ascendc_emulator::kBlockBytes;
    copy_detail::store<T>("DataCopy", dst, src, p.blockCount, p.blockLen * block, (uint64_t(p.blockLen) + p.dstStride) * block,
                          (uint64_t(p.blockLen) + p.srcStride) * block);
}

template <class T>
void DataCopyPad(const LocalTensor<T> &dst, const GlobalTensor<T> &src, const DataCopyExtParams &p, const DataCopyPadExtParams<T> &pad) {
    using namespace ascendc_emulator;
    const uint32_t padded = (p.blockLen + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    const uint32_t wanted = pad.rightPadding * static_cast<uint32_t>(sizeof(T));
    require(pad.leftPadding == 0, "unsupported", "DataCopyPad with padding on the left");
    require(wanted <= padded - p.blockLen, "bad-parameter",
            [&] { return current_core().label() + ": DataCopyPad pads beyond the DataBlock"; });
    // Without isPad, and beyond rightPadding, what fills the block is not defined: a signalling pattern here.
    T junk;
    std::memset(&junk, 0xCD, sizeof junk);
    copy_detail::load<T>("DataCopyPad", dst, src, p.blockCount, p.blockLen, uint64_t(p.blockLen) + p.srcStride,
                         padded + uint64_t(p.dstStride) * kBlockBytes, pad.isPad ? wanted : padded - p.blockLen,
                         pad.isPad ? &pad.paddingValue : &junk);
}

template <class T>
void DataCopyPad(const GlobalTensor<T> &dst, const LocalTensor<T> &src, const DataCopyExtParams &p) {
    using namespace ascendc_emulator;
    const uint32_t padded = (p.blockLen + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    copy_detail::store<T>("DataCopyPad", dst, src, p.blockCount, p.blockLen, uint64_t(p.blockLen) + p.dstStride,
                          padded + uint64_t(p.srcStride) * kBlockBytes);
}

// Rows of a matrix in global memory become NZ in L1: columns in strips of 32 bytes, each strip row after row.
template <class T>
void DataCopy(const LocalTensor<T> &dst, const GlobalTensor<T> &src, const Nd2NzParams &p) {
    using namespace ascendc_emulator;
    constexpr uint32_t strip = kBlockBytes / sizeof(T);
    if (p.nValue == 0 || p.dValue == 0 || p.ndNum == 0) return;
    Core &core = current_core();
    core.instruction = "DataCopy(Nd2Nz)";
    dst.require_aligned(core);
    dst.require_in(core, core.l1);
    require(p.ndNum == 1, "unsupported", "Nd2Nz of several matrices");
    issue_load(core, "DataCopy(Nd2Nz)", *core.machine.buffer_of(core, src), static_cast<double>(p.nValue) * p.dValue * sizeof(T));
    for (uint32_t row = 0; row < p.nValue; ++row) {
        const T *source = src.touch(core, static_cast<uint64_t>(row) * p.srcDValue, p.dValue, Direction::read).first;
        for (uint32_t column = 0; column < p.dValue; column += strip) {
            const uint32_t length = std::min<uint32_t>(strip, p.dValue - column) * static_cast<uint32_t>(sizeof(T));
            const uint32_t place = (column / strip * p.dstNzC0Stride + row * p.dstNzNStride) * kBlockBytes;
            uint8_t *target = dst.at(core, place, kBlockBytes, Direction::write);
            std::memset(target, 0, kBlockBytes);
            std::memcpy(target, source + column, length);
        }
    }
}

}  // namespace AscendC
