// The chip: its cores as threads of which exactly one runs at a time, global memory, and cross-core flags.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <vector>

#include "core.h"

namespace ascendc_emulator {

// When a flag that several cores set counts as set: once each of them has set it, as the documentation says, or after as
// many sets as there are cores, whichever they come from. A kernel must be right either way.
enum class FlagCounting { every_core, arrivals };

inline FlagCounting counting_named(const std::string &name) {
    require(name == "every-core" || name == "arrivals", "bad-parameter",
            [&] { return "flags are counted by every-core or arrivals, not by " + name; });
    return name == "arrivals" ? FlagCounting::arrivals : FlagCounting::every_core;
}

class Machine {
public:
    explicit Machine(Chip chip) : chip(std::move(chip)) {}

    Chip chip;
    FlagCounting flags = FlagCounting::every_core;
    std::vector<std::unique_ptr<Core>> cores;
    std::deque<GlobalBuffer> buffers;
    AscendC::KernelType type = AscendC::KERNEL_TYPE_MIX_AIC_1_2;
    int blocks = 0;

    // Registers a buffer; device addresses are host addresses.
    void map(std::string name, void *data, uint64_t bytes, Storage storage, bool streamed = false) {
        buffers.emplace_back(std::move(name), data, bytes, storage, streamed);
    }

    // Runs `kernel` on `blocks` AI cores (mix) or vector cores, in a fixed order: a core runs until it waits for
    // another one, then the next that can run goes on. Throws the first core's fault.
    Counters run(AscendC::KernelType kernel_type, int block_count, const std::function<void()> &kernel) {
        type = kernel_type;
        blocks = block_count;
        make_cores();
        const size_t count = cores.size();
        waiting.assign(count, Ready{});
        finished.assign(count, false);
        failure = nullptr;
        running = 0;
        arrived.clear();
        std::vector<std::thread> threads;
        for (size_t i = 0; i < count; ++i) {
            threads.emplace_back([this, i, &kernel] { body(static_cast<int>(i), kernel); });
        }
        for (std::thread &thread : threads) thread.join();
        if (failure) std::rethrow_exception(failure);
        return total();
    }

    // --- cross-core flags -----------------------------------------------------------------------------------
    void set_flag(Core &from, int mode, int pipe, int flag) {
        require(flag < kFlagIds, "flag-misuse", [&] { return from.label() + " sets flag " + text(static_cast<uint64_t>(flag)); });
        require(flag < kSyncAllFirst || flag > kSyncAllLast, "flag-misuse",
                [&] { return from.label() + " sets flag " + text(static_cast<uint64_t>(flag)) + ", which belongs to SyncAll (11 to 14)"; });
        require(mode <= 2, "unsupported", [&] { return "cross-core mode " + text(static_cast<uint64_t>(mode)); });
        require(pipe != PIPE_S && pipe != PIPE_ALL, "flag-misuse", "CrossCoreSetFlag takes neither PIPE_S nor PIPE_ALL");
        require(type != AscendC::KERNEL_TYPE_AIV_ONLY, "flag-misuse",
                "KERNEL_TYPE_AIV_ONLY has no cross-core flags; use KERNEL_TYPE_MIX_AIV_1_0");
        from.issue(pipe, "CrossCoreSetFlag", 0, 0);
        Knowledge reached = from.snapshot(pipe);
        reached.time += PathCost::cross_core;
        if (mode == 2 && from.is_cube()) {
            for (auto &core : cores) {
                if (!core->is_cube() && core->group == from.group) deliver(*core, flag, reached);
            }
            return;
        }
        std::vector<Core *> reporting, receiving;
        for (auto &core : cores) {
            const bool same_kind = core->kind == from.kind, same_group = core->group == from.group;
            if (same_kind && (mode == 0 || same_group)) reporting.push_back(core.get());
            if (mode == 2 ? core->is_cube() && same_group : same_kind && (mode == 0 || same_group)) {
                receiving.push_back(core.get());
            }
        }
        if (flags == FlagCounting::arrivals) {
            std::vector<Knowledge> &sets = arrived[{mode, flag, mode == 0 ? -1 : from.group, from.is_cube()}];
            sets.push_back(std::move(reached));
            if (sets.size() < reporting.size()) return;
            Knowledge all = sets.front();
            for (const Knowledge &one : sets) all.join(one);
            sets.clear();
            for (Core *core : receiving) deliver(*core, flag, all);
            return;
        }
        from.flags_set[flag].push_back(std::move(reached));
        for (Core *core : reporting) {
            if (core->flags_set[flag].empty()) return;
        }
        Knowledge all = reporting.front()->flags_set[flag].front();
        for (Core *core : reporting) {
            all.join(core->flags_set[flag].front());
            core->flags_set[flag].pop_front();
        }
        for (Core *core : receiving) deliver(*core, flag, all);
    }

    void wait_flag(Core &core, int flag) {
        core.issue(PIPE_S, "CrossCoreWaitFlag", 0, 0);
        block(core, [&core, flag] { return !core.flags[flag].empty(); }, "cross-core flag " + text(static_cast<uint64_t>(flag)));
        core.learn(PIPE_S, core.flags[flag].front());
        core.flags[flag].pop_front();
    }

    // --- global memory --------------------------------------------------------------------------------------
    GlobalBuffer &touch(Core &core, const uint8_t *address, uint64_t length, Direction how) {
        GlobalBuffer *buffer = find(address);
        if (buffer == nullptr || address + length > buffer->base + buffer->size) {
            throw Fault("gm-out-of-range",
                        core.where() + " touches " + text(length) + " bytes " +
                            (buffer ? "at byte " + text(static_cast<uint64_t>(address - buffer->base)) + " of " +
                                          buffer->name + ", which has " + text(buffer->size)
                                    : "at an address outside all buffers"));
        }
        if (buffer->storage == Storage::input) {
            require(how == Direction::read, "write-to-input", [&] { return core.where() + " writes to the input " + buffer->name; });
            return *buffer;
        }
        const uint64_t begin = static_cast<uint64_t>(address - buffer->base), end = begin + length;
        for (uint64_t b = begin / kBlockBytes; b * kBlockBytes < end; ++b) {
            const uint64_t low = b * kBlockBytes;
            check(core, *buffer, b, static_cast<uint32_t>(std::max(begin, low) - low),
                  static_cast<uint32_t>(std::min(end, low + kBlockBytes) - low), how);
        }
        return *buffer;
    }

    // The buffer a tensor points into, before any access is recorded.
    template <class Tensor>
    const GlobalBuffer *buffer_of(const Core &core, const Tensor &tensor) {
        const GlobalBuffer *buffer = find(reinterpret_cast<const uint8_t *>(tensor.address()));
        if (buffer == nullptr) throw Fault("gm-out-of-range", core.where() + " starts at an address outside all buffers");
        return buffer;
    }

    // Cycles of a transfer between global memory and a core.
    double gm_cycles(const Core &core, const GlobalBuffer &buffer, double bytes, Direction how) const {
        if (how == Direction::write) {
            return bytes / (core.is_cube() ? PathCost::l2_write_cube : PathCost::l2_write_vector);
        }
        const double l2 = core.is_cube() ? PathCost::l2_read_cube : PathCost::l2_read_vector;
        if (!buffer.streamed) return bytes / l2;
        const double share = chip.hbm_gb_per_s * 1e9 / (chip.mhz * 1e6) / readers(core.kind);
        return bytes / std::min(l2, share);
    }

private:
    struct Ready {
        std::function<bool()> test;
        std::string what;
    };

    void make_cores() {
        cores.clear();
        const bool mix = type == AscendC::KERNEL_TYPE_MIX_AIC_1_2;
        const int limit = static_cast<int>(chip.cube_cores) * (mix ? 1 : kSubBlocks);
        require(blocks >= 1 && blocks <= limit, "bad-launch", [&] {
            return text(static_cast<uint64_t>(blocks)) + " blocks on " + chip.name + ", which has " + text(static_cast<uint64_t>(limit));
        });
        const int count = mix ? blocks * (1 + kSubBlocks) : blocks;
        for (int id = 0; id < count; ++id) {
            const int group = mix ? id / (1 + kSubBlocks) : id / kSubBlocks;
            const int place = mix ? id % (1 + kSubBlocks) : 1 + id % kSubBlocks;
            cores.push_back(std::make_unique<Core>(*this, chip, id, place == 0 ? Kind::cube : Kind::vector, group,
                                                   place == 0 ? 0 : place - 1, count));
        }
    }

    int readers(Kind kind) const {
        int count = 0;
        for (const auto &core : cores) count += core->kind == kind;
        return std::max(count, 1);
    }

    GlobalBuffer *find(const uint8_t *address) {
        for (GlobalBuffer &buffer : buffers) {
            if (address >= buffer.base && address < buffer.base + buffer.size) return &buffer;
        }
        return nullptr;
    }

    void check(Core &core, GlobalBuffer &buffer, uint64_t index, uint32_t begin, uint32_t end, Direction how) {
        auto &records = buffer.records[index];
        const bool writes = how == Direction::write;
        require(writes || buffer.initialised[index], "uninitialised-read",
                [&] { return core.where() + " reads " + buffer.name + " at byte " + text(index * kBlockBytes) + ", which nothing wrote"; });
        for (size_t i = 0; i < records.size();) {
            GlobalBuffer::Record &record = records[i];
            const bool overlap = record.begin < end && begin < record.end;
            if (overlap && (writes || record.write) && !core.ordered(record.access, writes && !record.write)) {
                throw Fault(record.access.core == core.id ? (record.access.pipe == core.current_pipe ? "missing-barrier" : "missing-flag")
                                                          : "cross-core-race",
                            core.where() + (writes ? " writes " : " reads ") + buffer.name + " at byte " +
                                text(index * kBlockBytes + begin) + ", which " + cores[record.access.core]->label() + " " +
                                (record.write ? "wrote" : "reads") + " on pipe " + pipe_name(record.access.pipe) +
                                "; nothing orders them");
            }
            const bool covered = overlap && begin <= record.begin && record.end <= end;
            const bool repeated = !writes && !record.write && record.access.core == core.id && record.access.pipe == core.current_pipe;
            if (covered && (writes || repeated)) {
                record = records.back();
                records.pop_back();
                continue;
            }
            ++i;
        }
        records.push_back({begin, end, {core.id, core.current_pipe, core.sequence()}, writes});
        if (writes) buffer.initialised[index] = true;
    }

    void deliver(Core &core, int flag, const Knowledge &reached) {
        require(core.flags[flag].size() < kFlagLimit, "flag-misuse", [&] {
            return "flag " + text(static_cast<uint64_t>(flag)) + " of " + core.label() + " is set more than 15 times without a wait";
        });
        core.flags[flag].push_back(reached);
    }

    // --- scheduling: a baton is passed, so runs are repeatable and a deadlock is seen at once ---------------
    void body(int id, const std::function<void()> &kernel);

    void block(Core &core, std::function<bool()> test, const std::string &what) {
        if (test()) return;
        std::unique_lock<std::mutex> lock(mutex);
        waiting[core.id] = {std::move(test), what};
        pass_baton();
        changed.wait(lock, [this, &core] { return running == core.id || failure; });
        waiting[core.id] = Ready{};
        if (failure) throw Aborted{};
    }

    void pass_baton() {  // holds the mutex
        const int count = static_cast<int>(cores.size());
        for (int step = 1; step <= count; ++step) {
            const int next = (running + step) % count;
            if (!finished[next] && (!waiting[next].test || waiting[next].test())) {
                running = next;
                changed.notify_all();
                return;
            }
        }
        std::string stuck;
        for (int i = 0; i < count; ++i) {
            if (!finished[i]) stuck += (stuck.empty() ? "" : ", ") + cores[i]->label() + " waits for " + waiting[i].what;
        }
        running = -1;
        if (!stuck.empty() && !failure) failure = std::make_exception_ptr(Fault("deadlock", stuck));
        changed.notify_all();
    }

    Counters total() const {
        Counters sum;
        for (const auto &core : cores) {
            Counters one = core->counters;
            for (double end : core->drained) one.cycles = std::max(one.cycles, end);
            for (int pipe = 0; pipe < kPipes; ++pipe) {
                if (core->issued[pipe]) one.busy[(core->is_cube() ? "AIC." : "AIV.") + std::string(pipe_name(pipe))] = core->busy[pipe];
            }
            sum.add(one);
        }
        return sum;
    }

    void check_leftovers(Core &core) const {
        for (const auto &[key, queue] : core.events) {
            require(queue.empty(), "flag-misuse", [&] { return core.label() + " ends with an event that was set and not waited for"; });
        }
        for (int flag = 0; flag < kFlagIds; ++flag) {
            require(core.flags[flag].empty(), "flag-misuse", [&] {
                return core.label() + " ends with cross-core flag " + text(static_cast<uint64_t>(flag)) + " set and not waited for";
            });
        }
    }

    std::mutex mutex;
    std::condition_variable changed;
    std::vector<Ready> waiting;
    std::vector<bool> finished;
    std::exception_ptr failure;
    int running = 0;
    std::map<std::tuple<int, int, int, bool>, std::vector<Knowledge>> arrived;  // (mode, flag, group or -1, cube)
};

inline thread_local Core *running_core = nullptr;

inline Core &current_core() { return *running_core; }

inline void Machine::body(int id, const std::function<void()> &kernel) {
    {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [this, id] { return running == id || failure; });
        if (failure) return;
    }
    running_core = cores[id].get();
    try {
        kernel();
    } catch (const Aborted &) {
        return;
    } catch (...) {
        std::unique_lock<std::mutex> lock(mutex);
        if (!failure) failure = std::current_exception();
        changed.notify_all();
        return;
    }
    std::unique_lock<std::mutex> lock(mutex);
    finished[id] = true;
    bool all = true;
    for (bool done : finished) all = all && done;
    if (all) {
        try {
            for (auto &core : cores) check_leftovers(*core);
        } catch (...) {
            failure = std::current_exception();
        }
        changed.notify_all();
        return;
    }
    pass_baton();
}

inline void Core::declare_kernel_type(AscendC::KernelType type) {
    require(type == machine.type, "bad-launch", "the kernel declares another type than it is launched with");
}

}  // namespace ascendc_emulator
