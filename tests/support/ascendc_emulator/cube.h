// The cube: fractals from L1 to L0A and L0B, the matrix product into L0C, and its way out (Fixpipe).
//
// A fractal is 16 x 16 elements of 16 bits. L1 holds NZ (strips of 16 columns, row after row); on dav-2201 L0A wants
// fractals in row order (zZ), L0B those of the transposed right matrix in column order, which is what NZ of an
// (n, k) matrix already is; L0C is NZ of float.
#pragma once

#include <vector>

#include "tensor.h"

namespace AscendC {

enum class QuantMode_t { NoQuant, F322F16, F322BF16 };
enum class CO2Layout : uint8_t { NZ = 0, ROW_MAJOR, COLUMN_MAJOR };
struct FixpipeConfig {
    CO2Layout format;
};
constexpr FixpipeConfig CFG_NZ = {CO2Layout::NZ};
constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

struct LoadData2DParams {
    LoadData2DParams() = default;
    LoadData2DParams(uint16_t start, uint8_t repeats, uint16_t stride, uint8_t reserved, uint16_t gap, bool transpose, uint8_t mode)
        : startIndex(start), dstGap(gap), srcStride(stride), ifTranspose(transpose), repeatTimes(repeats), sid(reserved), addrMode(mode) {}
    uint16_t startIndex = 0;  // fractals
    uint16_t dstGap = 0;
    uint16_t srcStride = 0;
    bool ifTranspose = false;
    uint8_t repeatTimes = 0;
    uint8_t sid = 0;
    uint8_t addrMode = 0;
};

struct MmadParams {
    MmadParams() = default;
    MmadParams(uint16_t rows, uint16_t columns, uint16_t depth, uint8_t unit, bool source, bool fresh)
        : m(rows), n(columns), k(depth), unitFlag(unit), cmatrixSource(source), cmatrixInitVal(fresh) {}
    uint16_t m = 0;
    uint16_t n = 0;
    uint16_t k = 0;
    bool isBias = false;
    int32_t fmOffset = 0;
    uint8_t unitFlag = 0;
    bool kDirectionAlign = false;
    bool cmatrixSource = false;
    bool cmatrixInitVal = true;  // true: the result replaces what is in L0C, false: it is added
};

struct FixpipeParamsV220 {
    FixpipeParamsV220() = default;
    FixpipeParamsV220(uint16_t columns, uint16_t rows, uint16_t source_stride, uint32_t destination_stride, bool relu)
        : nSize(columns), mSize(rows), srcStride(source_stride), dstStride(destination_stride), reluEn(relu) {}
    uint16_t nSize = 0;
    uint16_t mSize = 0;
    uint16_t srcStride = 0;  // rows of a strip of L0C, a multiple of 16
    uint32_t dstStride = 0;  // elements of a row in global memory
    QuantMode_t quantPre = QuantMode_t::NoQuant;
    uint64_t deqScalar = 0;
    uint16_t ndNum = 1;
    uint16_t srcNdStride = 0;
    uint16_t dstNdStride = 0;
    bool reluEn = false;
    uint8_t unitFlag = 0;
};

template <class T>
void LoadData(const LocalTensor<T> &dst, const LocalTensor<T> &src, const LoadData2DParams &p) {
    using namespace ascendc_emulator;
    static_assert(sizeof(T) == 2);
    if (p.repeatTimes == 0) return;
    Core &core = current_core();
    core.instruction = "LoadData";
    src.require_in(core, core.l1);
    require(dst.memory() == &core.l0a || dst.memory() == &core.l0b, "wrong-memory", [&] { return core.where() + " writes to L0A or L0B"; });
    require(!p.ifTranspose && p.addrMode == 0, "unsupported", "LoadData with transposition or descending addresses");
    src.require_aligned(core);
    dst.require_aligned(core, kFractalBytes);
    const bool left = dst.memory() == &core.l0a;
    const uint32_t bytes = p.repeatTimes * kFractalBytes;
    core.counters.bytes[left ? "L1->L0A" : "L1->L0B"] += bytes;
    core.issue(PIPE_MTE1, "LoadData", bytes / (left ? PathCost::l1_to_l0a : PathCost::l1_to_l0b), VectorCost::drain);
    for (uint32_t i = 0; i < p.repeatTimes; ++i) {
        const uint32_t from = (p.startIndex + i * p.srcStride) * kFractalBytes, to = i * (1u + p.dstGap) * kFractalBytes;
        const uint8_t *source = src.at(core, from, kFractalBytes, Direction::read, false);
        std::memcpy(dst.at(core, to, kFractalBytes, Direction::write), source, kFractalBytes);
        for (uint32_t b = 0; b < kFractalBytes; b += kBlockBytes) {
            if (!src.initialised(from + b)) dst.forget(to + b);  // rows that padding leaves undefined stay so
        }
    }
}

template <class T, class U, class S>
void Mmad(const LocalTensor<T> &dst, const LocalTensor<U> &fm, const LocalTensor<S> &filter, const MmadParams &p) {
    using namespace ascendc_emulator;
    static_assert(std::is_same_v<T, float> && std::is_same_v<U, half> && std::is_same_v<S, half>, "only half x half -> float");
    Core &core = current_core();
    core.instruction = "Mmad";
    dst.require_in(core, core.l0c);
    fm.require_in(core, core.l0a);
    filter.require_in(core, core.l0b);
    fm.require_aligned(core, kFractalBytes);
    filter.require_aligned(core, kFractalBytes);
    dst.require_aligned(core, 64);
    require(p.m != 1, "unsupported", "Mmad with m = 1 switches the hardware to its GEMV layout; round m up to 16");
    require(p.cmatrixInitVal && p.unitFlag == 0 && !p.isBias, "unsupported", "Mmad that accumulates, with a unit flag or a bias");
    require(p.m % 16 == 0 && p.n % 16 == 0 && p.k % 16 == 0 && p.m && p.n && p.k, "unsupported", "Mmad of partial fractals");
    const uint32_t mf = p.m / 16u, nf = p.n / 16u, kf = p.k / 16u;
    core.issue(PIPE_M, "Mmad", PathCost::cube_head + static_cast<double>(mf) * nf * kf, VectorCost::drain);
    core.counters.bytes["cube 16x16x16"] += static_cast<uint64_t>(mf) * nf * kf;
    const half *a = reinterpret_cast<const half *>(fm.at(core, 0, mf * kf * kFractalBytes, Direction::read));
    const half *b = reinterpret_cast<const half *>(filter.at(core, 0, nf * kf * kFractalBytes, Direction::read));
    float *c = reinterpret_cast<float *>(dst.at(core, 0, mf * nf * 2 * kFractalBytes, Direction::write));
    std::vector<float> left(static_cast<size_t>(p.m) * p.k), right(static_cast<size_t>(p.n) * p.k);
    for (uint32_t i = 0; i < mf * kf * 256; ++i) {
        const uint32_t fractal = i / 256, row = i % 256 / 16, column = i % 16;
        left[(fractal / kf * 16 + row) * p.k + fractal % kf * 16 + column] = static_cast<float>(a[i]);
    }
    for (uint32_t i = 0; i < nf * kf * 256; ++i) {  // transposed to (k, n), so that the inner loop is contiguous
        const uint32_t fractal = i / 256, row = i % 256 / 16, column = i % 16;
        right[(fractal / nf * 16 + column) * p.n + fractal % nf * 16 + row] = static_cast<float>(b[i]);
    }
    std::vector<float> sum(p.n);
    for (uint32_t i = 0; i < p.m; ++i) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (uint32_t k = 0; k < p.k; ++k) {
            const float x = left[i * p.k + k];
            const float *row = &right[static_cast<size_t>(k) * p.n];
            for (uint32_t j = 0; j < p.n; ++j) sum[j] += x * row[j];
        }
        for (uint32_t j = 0; j < p.n; ++j) c[(j / 16 * p.m + i) * 16 + j % 16] = sum[j];
    }
}

template <class T, class U, const FixpipeConfig &config = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T> &dst, const LocalTensor<U> &src, const FixpipeParamsV220 &p) {
    using namespace ascendc_emulator;
    static_assert(std::is_same_v<T, float> && std::is_same_v<U, float>, "only float -> float");
    static_assert(config.format == CO2Layout::ROW_MAJOR, "only rows");
    if (p.nSize == 0 || p.mSize == 0) return;
    Core &core = current_core();
    core.instruction = "Fixpipe";
    core.current_pipe = PIPE_FIX;
    src.require_in(core, core.l0c);
    src.require_aligned(core, 64);
    require(p.ndNum == 1 && p.quantPre == QuantMode_t::NoQuant && !p.reluEn && p.unitFlag == 0, "unsupported",
            "Fixpipe with more than a copy");
    require(p.nSize % 16 == 0 && p.srcStride % 16 == 0 && p.srcStride >= p.mSize, "bad-parameter",
            [&] { return core.where() + ": nSize or srcStride"; });
    issue_store(core, "Fixpipe", *core.machine.buffer_of(core, dst), static_cast<double>(p.nSize) * p.mSize * sizeof(T));
    for (uint32_t row = 0; row < p.mSize; ++row) {
        float *target = dst.touch(core, static_cast<uint64_t>(row) * p.dstStride, p.nSize, Direction::write).first;
        for (uint32_t column = 0; column < p.nSize; column += 16) {
            std::memcpy(target + column, src.at(core, (column / 16 * p.srcStride + row) * 64, 64, Direction::read), 64);
        }
    }
}

}  // namespace AscendC
