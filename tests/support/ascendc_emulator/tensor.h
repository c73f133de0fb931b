// GlobalTensor and LocalTensor: typed views whose every access is checked.
#pragma once

#include <memory>

#include "machine.h"
#include "numeric.h"

namespace AscendC {

enum class TPosition : uint8_t { GM, A1, A2, B1, B2, CO1, VECIN, VECOUT, VECCALC };
using QuePosition = TPosition;

template <class T>
class GlobalTensor {
public:
    void SetGlobalBuffer(T *address, uint64_t count) {
        base_ = address;
        count_ = count;
    }
    void SetGlobalBuffer(T *address) { SetGlobalBuffer(address, UINT64_MAX / sizeof(T)); }

    GlobalTensor operator[](uint64_t offset) const {
        GlobalTensor out = *this;
        out.base_ = base_ + offset;
        out.count_ = offset > count_ ? 0 : count_ - offset;
        return out;
    }

    // The scalar unit reads global memory through a cache of its own.
    T GetValue(uint64_t offset) const {
        using namespace ascendc_emulator;
        Core &core = current_core();
        core.issue(PIPE_S, "GlobalTensor.GetValue", PathCost::scalar_load, 0);
        return *touch(core, offset, 1, Direction::read).first;
    }

    uint64_t GetSize() const { return count_; }
    const T *address() const { return base_; }

    // Checked pointer to `count` elements, and the buffer they belong to.
    std::pair<T *, ascendc_emulator::GlobalBuffer *> touch(ascendc_emulator::Core &core, uint64_t offset, uint64_t count,
                                                           ascendc_emulator::Direction how) const {
        using namespace ascendc_emulator;
        require(offset + count <= count_, "gm-out-of-range", [&] {
            return core.where() + " touches elements " + text(offset) + ".." + text(offset + count) +
                   " of a GlobalTensor that was given " + text(count_);
        });
        GlobalBuffer &buffer = core.machine.touch(core, reinterpret_cast<const uint8_t *>(base_ + offset), count * sizeof(T), how);
        return {base_ + offset, &buffer};
    }

private:
    T *base_ = nullptr;
    uint64_t count_ = 0;
};

// Bytes of a buffer in the memory of a core, and the check of every access to them: compiled once for all types.
class LocalView {
public:
    LocalView() = default;
    LocalView(ascendc_emulator::LocalMemory *memory, std::shared_ptr<ascendc_emulator::Allocation> allocation, uint32_t offset,
              uint32_t bytes)
        : memory_(memory), allocation_(std::move(allocation)), offset_(offset), bytes_(bytes) {}

    uint8_t *at(ascendc_emulator::Core &core, uint32_t byte, uint32_t length, ascendc_emulator::Direction how,
                bool needs_data = true) const {
        ascendc_emulator::require(memory_ != nullptr, "local-out-of-range",
                                  [&] { return core.where() + " uses a tensor without a buffer"; });
        return core.touch(*memory_, *allocation_, offset_ + byte, length, how, needs_data);
    }
    bool initialised(uint32_t byte) const { return memory_->blocks[(offset_ + byte) / ascendc_emulator::kBlockBytes].initialised; }
    void forget(uint32_t byte) const { memory_->blocks[(offset_ + byte) / ascendc_emulator::kBlockBytes].initialised = false; }
    uint32_t offset() const { return offset_; }
    const ascendc_emulator::LocalMemory *memory() const { return memory_; }
    const std::shared_ptr<ascendc_emulator::Allocation> &allocation() const { return allocation_; }

    void require_aligned(const ascendc_emulator::Core &core, uint32_t alignment = ascendc_emulator::kBlockBytes) const {
        ascendc_emulator::require(offset_ % alignment == 0, "misaligned", [&] {
            return core.where() + ": a local address of " + std::to_string(offset_) + " is not a multiple of " +
                   std::to_string(alignment) + " bytes";
        });
    }
    void require_in(const ascendc_emulator::Core &core, const ascendc_emulator::LocalMemory &memory) const {
        ascendc_emulator::require(memory_ == &memory, "wrong-memory", [&] {
            return core.where() + " needs a tensor in " + memory.name + ", got one in " + (memory_ ? memory_->name : "no memory");
        });
    }

protected:
    LocalView behind(uint32_t element, uint32_t size) const {
        const uint64_t skip = static_cast<uint64_t>(element) * size;
        ascendc_emulator::require(skip <= bytes_, "local-out-of-range", [&] {
            return "element " + std::to_string(element) + " of a tensor of " + std::to_string(bytes_ / size);
        });
        return LocalView(memory_, allocation_, offset_ + static_cast<uint32_t>(skip), bytes_ - static_cast<uint32_t>(skip));
    }

    ascendc_emulator::LocalMemory *memory_ = nullptr;
    std::shared_ptr<ascendc_emulator::Allocation> allocation_;
    uint32_t offset_ = 0, bytes_ = 0;
};

template <class T>
class LocalTensor : public LocalView {
public:
    using PrimType = T;

    LocalTensor() = default;
    explicit LocalTensor(LocalView view) : LocalView(std::move(view)) {}
    template <class U>
    explicit LocalTensor(const LocalTensor<U> &) = delete;  // that is ReinterpretCast's

    LocalTensor operator[](uint32_t element) const { return LocalTensor(behind(element, sizeof(T))); }

    template <class U>
    LocalTensor<U> ReinterpretCast() const {
        return LocalTensor<U>(static_cast<const LocalView &>(*this));
    }

    uint32_t GetSize() const { return bytes_ / static_cast<uint32_t>(sizeof(T)); }

    T GetValue(uint32_t element) const {
        using namespace ascendc_emulator;
        Core &core = current_core();
        core.issue(PIPE_S, "LocalTensor.GetValue", PathCost::scalar_load, 0);
        require_aligned(core, sizeof(T));
        T value;
        std::memcpy(&value, at(core, element * static_cast<uint32_t>(sizeof(T)), sizeof(T), Direction::read), sizeof(T));
        return value;
    }

    void SetValue(uint32_t element, T value) const {
        using namespace ascendc_emulator;
        Core &core = current_core();
        core.issue(PIPE_S, "LocalTensor.SetValue", PathCost::scalar_load, 0);
        require_aligned(core, sizeof(T));
        std::memcpy(at(core, element * static_cast<uint32_t>(sizeof(T)), sizeof(T), Direction::write), &value, sizeof(T));
    }
};

}  // namespace AscendC
