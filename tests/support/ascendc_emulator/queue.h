// TPipe, TQue and TBuf: capacity of each memory, the discipline of queues, and the order their steps establish.
#pragma once

#include <deque>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "sync.h"
#include "tensor.h"

namespace AscendC {

template <TPosition position>
constexpr pipe_t producer_pipe() {
    switch (position) {
        case TPosition::VECIN: case TPosition::A1: case TPosition::B1: return PIPE_MTE2;
        case TPosition::VECOUT: return PIPE_V;
        case TPosition::A2: case TPosition::B2: return PIPE_MTE1;
        case TPosition::CO1: return PIPE_M;
        default: return PIPE_S;
    }
}

template <TPosition position>
constexpr pipe_t consumer_pipe() {
    switch (position) {
        case TPosition::VECIN: return PIPE_V;
        case TPosition::VECOUT: return PIPE_MTE3;
        case TPosition::A1: case TPosition::B1: return PIPE_MTE1;
        case TPosition::A2: case TPosition::B2: return PIPE_M;
        case TPosition::CO1: return PIPE_FIX;
        default: return PIPE_S;
    }
}

inline ascendc_emulator::LocalMemory &memory_of(ascendc_emulator::Core &core, TPosition position) {
    switch (position) {
        case TPosition::A1: case TPosition::B1: return core.l1;
        case TPosition::A2: return core.l0a;
        case TPosition::B2: return core.l0b;
        case TPosition::CO1: return core.l0c;
        default: return core.ub;
    }
}

// What every queue does, between whichever pipes and whatever its tensors hold: compiled once.
class Queue {
public:
    // --- for TPipe ------------------------------------------------------------------------------------------
    void add(ascendc_emulator::Core &core, uint32_t offset, uint32_t bytes) {
        auto allocation = std::make_shared<ascendc_emulator::Allocation>();
        allocation->state = ascendc_emulator::Allocation::State::free;
        allocation->owner = label();
        allocation->begin = offset;
        allocation->size = bytes;
        buffers_.push_back({allocation, &memory_of(core, position_), false, {}, {}});
    }

protected:
    using Allocated = std::shared_ptr<ascendc_emulator::Allocation>;

    struct Buffer {
        Allocated allocation;
        ascendc_emulator::LocalMemory *memory;
        bool used;
        ascendc_emulator::Knowledge filled, released;

        LocalView view() const { return LocalView(memory, allocation, allocation->begin, allocation->size); }
    };

    Queue(TPosition position, pipe_t producer, pipe_t consumer, int32_t depth)
        : position_(position), producer_(producer), consumer_(consumer), depth_(depth) {}

    LocalView allocate() {
        ascendc_emulator::Core &core = ascendc_emulator::current_core();
        for (size_t step = 0; step < buffers_.size(); ++step) {  // in turn, so that two buffers do overlap
            Buffer &buffer = buffers_[(next_ + step) % buffers_.size()];
            if (buffer.allocation->state != ascendc_emulator::Allocation::State::free) continue;
            next_ = (next_ + step + 1) % buffers_.size();
            buffer.allocation->state = ascendc_emulator::Allocation::State::held;
            if (buffer.used) core.learn(producer_, buffer.released);
            buffer.used = true;
            return buffer.view();
        }
        throw ascendc_emulator::Fault("queue-misuse", core.label() + ": AllocTensor on " + label() + " finds no free buffer of " +
                                                          std::to_string(buffers_.size()) + "; the hardware would wait for ever");
    }

    void enqueue(const Allocated &allocation) {
        using ascendc_emulator::Allocation;
        ascendc_emulator::Core &core = ascendc_emulator::current_core();
        Buffer &buffer = owner(core, allocation, "EnQue");
        ascendc_emulator::require(buffer.allocation->state == Allocation::State::held, "queue-misuse",
                                  [&] { return core.label() + ": EnQue of a tensor of " + label() + " that is not held"; });
        ascendc_emulator::require(static_cast<int32_t>(queued_.size()) < depth_, "queue-misuse", [&] {
            return core.label() + ": EnQue on " + label() + " beyond its depth of " + std::to_string(depth_);
        });
        buffer.allocation->state = Allocation::State::queued;
        buffer.filled = core.snapshot(producer_);
        queued_.push_back(&buffer);
    }

    LocalView dequeue() {
        ascendc_emulator::Core &core = ascendc_emulator::current_core();
        ascendc_emulator::require(!queued_.empty(), "queue-misuse", [&] { return core.label() + ": DeQue on an empty " + label(); });
        Buffer &buffer = *queued_.front();
        queued_.pop_front();
        buffer.allocation->state = ascendc_emulator::Allocation::State::held;
        core.learn(consumer_, buffer.filled);
        return buffer.view();
    }

    void release(const Allocated &allocation) {
        using ascendc_emulator::Allocation;
        ascendc_emulator::Core &core = ascendc_emulator::current_core();
        Buffer &buffer = owner(core, allocation, "FreeTensor");
        ascendc_emulator::require(buffer.allocation->state == Allocation::State::held, "queue-misuse",
                                  [&] { return core.label() + ": FreeTensor of a tensor of " + label() + " that is not held"; });
        buffer.allocation->state = Allocation::State::free;
        buffer.released = core.snapshot(consumer_);
    }

private:
    std::string label() const {
        return std::string("a queue from ") + ascendc_emulator::pipe_name(producer_) + " to " + ascendc_emulator::pipe_name(consumer_);
    }

    Buffer &owner(const ascendc_emulator::Core &core, const Allocated &allocation, const char *step) {
        for (Buffer &buffer : buffers_) {
            if (buffer.allocation == allocation) return buffer;
        }
        throw ascendc_emulator::Fault("queue-misuse", core.label() + ": " + step + " of a tensor that is not of " + label());
    }

    TPosition position_;
    pipe_t producer_, consumer_;
    int32_t depth_;
    std::deque<Buffer> buffers_;
    size_t next_ = 0;
    std::deque<Buffer *> queued_;
};

template <TPosition position, int32_t depth, auto mask = 0>
class TQue : public Queue {
public:
    TQue() : Queue(position, producer_pipe<position>(), consumer_pipe<position>(), depth) {}

    template <class T>
    LocalTensor<T> AllocTensor() {
        return LocalTensor<T>(allocate());
    }

    template <class T>
    bool EnQue(const LocalTensor<T> &tensor) {
        enqueue(tensor.allocation());
        return true;
    }

    template <class T>
    LocalTensor<T> DeQue() {
        return LocalTensor<T>(dequeue());
    }

    template <class T>
    void FreeTensor(LocalTensor<T> &tensor) {
        release(tensor.allocation());
    }
};

template <TPosition position = TPosition::VECCALC>
class TBuf {
public:
    template <class T>
    LocalTensor<T> Get() const {
        return LocalTensor<T>(LocalView(memory_, allocation_, allocation_->begin, allocation_->size));
    }

    void add(ascendc_emulator::Core &core, uint32_t offset, uint32_t bytes) {
        memory_ = &memory_of(core, position);
        allocation_ = std::make_shared<ascendc_emulator::Allocation>();
        allocation_->owner = "a TBuf";
        allocation_->begin = offset;
        allocation_->size = bytes;
    }

private:
    ascendc_emulator::LocalMemory *memory_ = nullptr;
    std::shared_ptr<ascendc_emulator::Allocation> allocation_;
};

class TPipe {
public:
    // On a cube core the pipe sets three events for its own use and waits for them at its end.
    TPipe() {
        reset_memories();
        ascendc_emulator::Core &core = ascendc_emulator::current_core();
        for (int id = 0; core.is_cube() && id < ascendc_emulator::kCubePipeEvents; ++id) SetFlag<HardEvent::M_MTE1>(id);
    }
    ~TPipe() noexcept(false) {
        if (std::uncaught_exceptions() > exceptions_) return;
        ascendc_emulator::Core &core = ascendc_emulator::current_core();
        for (int id = 0; core.is_cube() && id < ascendc_emulator::kCubePipeEvents; ++id) WaitFlag<HardEvent::M_MTE1>(id);
    }
    TPipe(const TPipe &) = delete;
    TPipe &operator=(const TPipe &) = delete;

    template <TPosition position, int32_t depth, auto mask>
    bool InitBuffer(TQue<position, depth, mask> &queue, uint8_t count, uint32_t bytes) {
        ascendc_emulator::Core &core = ascendc_emulator::current_core();
        claim_events(core, producer_pipe<position>(), consumer_pipe<position>(), count);
        claim_events(core, consumer_pipe<position>(), producer_pipe<position>(), count);
        for (uint8_t i = 0; i < count; ++i) queue.add(core, take(core, position, bytes), bytes);
        return true;
    }

    template <TPosition position>
    bool InitBuffer(TBuf<position> &buffer, uint32_t bytes) {
        ascendc_emulator::Core &core = ascendc_emulator::current_core();
        buffer.add(core, take(core, position, bytes), bytes);
        return true;
    }

    // Gives every buffer back. Queues and buffers must be initialised anew.
    void Reset() {
        PipeBarrier<PIPE_ALL>();
        events_.clear();
        reset_memories();
    }

    template <HardEvent event>
    TEventID AllocEventID() {
        using namespace ascendc_emulator;
        Core &core = current_core();
        const int from = static_cast<int>(event) / 10, to = static_cast<int>(event) % 10, key = static_cast<int>(event);
        claim_events(core, from, to, 1);
        int id = kept_events(core, from, to);
        while (core.allocated_events[{key, id}]) ++id;
        core.allocated_events[{key, id}] = true;
        return static_cast<TEventID>(id);
    }

    template <HardEvent event>
    void ReleaseEventID(TEventID id) {
        ascendc_emulator::Core &core = ascendc_emulator::current_core();
        bool &allocated = core.allocated_events[{static_cast<int>(event), id}];
        ascendc_emulator::require(allocated, "flag-misuse", [&] { return core.label() + " releases an event that it was not given"; });
        allocated = false;
        --events_[{static_cast<int>(event) / 10, static_cast<int>(event) % 10}];
    }

private:
    static void reset_memories() {
        ascendc_emulator::Core &core = ascendc_emulator::current_core();
        for (ascendc_emulator::LocalMemory *memory : {&core.ub, &core.l1, &core.l0a, &core.l0b, &core.l0c}) {
            memory->used = 0;
            for (auto &block : memory->blocks) block.initialised = false;
        }
    }

    static uint32_t take(ascendc_emulator::Core &core, TPosition position, uint32_t &bytes) {
        using namespace ascendc_emulator;
        LocalMemory &memory = memory_of(core, position);
        bytes = (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
        std::string name = memory.name + "-overflow";
        for (char &c : name) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c + ('a' - 'A') : c);
        require(memory.used + bytes <= memory.capacity, name.c_str(), [&] {
            return core.label() + ": a buffer of " + text(bytes) + " bytes on top of " + text(memory.used) + " does not fit into the " +
                   text(memory.capacity) + " bytes of " + memory.name + " of " + core.chip.name;
        });
        const uint32_t offset = memory.used;
        memory.used += bytes;
        return offset;
    }

    // Events of a pair of pipes that the pipe keeps for itself.
    static int kept_events(const ascendc_emulator::Core &core, int from, int to) {
        return core.is_cube() && from == PIPE_M && to == PIPE_MTE1 ? ascendc_emulator::kCubePipeEvents : 0;
    }

    // A queue takes an event each way for every buffer: filled, and free again.
    void claim_events(const ascendc_emulator::Core &core, int from, int to, int count) {
        using namespace ascendc_emulator;
        int &events = events_[{from, to}];
        events += count;
        const int kept = kept_events(core, from, to);
        require(events + kept <= kEventIds, "flag-misuse", [&] {
            return core.label() + ": " + std::to_string(events) + " events from " + pipe_name(from) + " to " + pipe_name(to) + " beside " +
                   std::to_string(kept) + " that the pipe keeps for itself, and there are 8";
        });
    }

    std::map<std::pair<int, int>, int> events_;
    const int exceptions_ = std::uncaught_exceptions();
};

}  // namespace AscendC
