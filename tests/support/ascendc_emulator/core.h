// One AIC or AIV core: its memories, its pipes, and the checks of every access.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "chip.h"
#include "clock.h"
#include "counters.h"
#include "fault.h"
#include "memory.h"

namespace AscendC {
enum KernelType { KERNEL_TYPE_AIV_ONLY, KERNEL_TYPE_MIX_AIV_1_0, KERNEL_TYPE_MIX_AIC_1_2 };
}

namespace ascendc_emulator {

class Machine;

enum class Kind { cube, vector };
enum class Direction { read, write };

class Core {
public:
    Core(Machine &machine, const Chip &chip, int id, Kind kind, int group, int sub, int cores)
        : machine(machine), chip(chip), id(id), kind(kind), group(group), sub(sub) {
        ub.configure("UB", is_cube() ? 0 : chip.ub);
        l1.configure("L1", is_cube() ? chip.l1 : 0);
        l0a.configure("L0A", is_cube() ? chip.l0a : 0);
        l0b.configure("L0B", is_cube() ? chip.l0b : 0);
        l0c.configure("L0C", is_cube() ? chip.l0c : 0);
        for (Knowledge &pipe : knows) {
            pipe.complete.assign(static_cast<size_t>(cores) * kPipes, 0);
        }
    }

    bool is_cube() const { return kind == Kind::cube; }
    std::string label() const {
        return is_cube() ? "AIC" + std::to_string(group) : "AIV" + std::to_string(group * kSubBlocks + sub);
    }

    void declare_kernel_type(AscendC::KernelType type);

    // --- instructions -------------------------------------------------------------------------------------
    // An instruction is issued by the scalar unit in program order; it starts when its pipe is free and what
    // the pipe waits for is there; it ends `latency` after its last cycle of occupation.
    void issue(int pipe, const char *name, double cycles, double latency) {
        knows[PIPE_S].time += PathCost::scalar_issue;
        if (scalar_version_seen[pipe] != scalar_version && pipe != PIPE_S) {
            const double free_at = knows[pipe].time;
            knows[pipe].join(knows[PIPE_S]);
            knows[pipe].time = free_at;
            scalar_version_seen[pipe] = scalar_version;
        }
        const double start = std::max(knows[pipe].time, knows[PIPE_S].time);
        knows[pipe].time = start + cycles;
        drained[pipe] = std::max(drained[pipe], start + cycles + latency);
        busy[pipe] += cycles;
        counters.calls[name] += 1;
        instruction = name;
        current_pipe = pipe;
        ++issued[pipe];
    }

    uint32_t sequence() const { return issued[current_pipe]; }

    bool ordered(const Access &before, bool same_pipe_is_order) const {
        if (before.core < 0) return true;
        if (before.core == id && before.pipe == current_pipe) {
            if (before.sequence == sequence() || current_pipe == PIPE_S || same_pipe_is_order) return true;
        }
        return knows[current_pipe].complete[static_cast<size_t>(before.core) * kPipes + before.pipe] >= before.sequence;
    }

    // --- order --------------------------------------------------------------------------------------------
    // What everything issued so far on `pipe` will have established once it is complete.
    Knowledge snapshot(int pipe) const {
        Knowledge out = knows[pipe];
        if (scalar_version_seen[pipe] != scalar_version) out.join(knows[PIPE_S]);
        out.complete[static_cast<size_t>(id) * kPipes + pipe] = issued[pipe];
        out.time = pipe == PIPE_S ? knows[PIPE_S].time : drained[pipe];
        return out;
    }

    void learn(int pipe, const Knowledge &what) {
        knows[pipe].join(what);
        if (pipe == PIPE_S) ++scalar_version;
    }

    void barrier(int pipe) {
        if (pipe != PIPE_ALL) {
            counters.calls["PipeBarrier"] += 1;
            learn(pipe, snapshot(pipe));
            return;
        }
        for (int p = 0; p < kPipes; ++p) learn(PIPE_S, snapshot(p));
        for (int p = 0; p < kPipes; ++p) learn(p, knows[PIPE_S]);
    }

    // --- accesses -----------------------------------------------------------------------------------------
    uint8_t *touch(LocalMemory &memory, const Allocation &allocation, uint32_t offset, uint32_t length, Direction how,
                   bool needs_data = true) {
        if (allocation.state == Allocation::State::free) {
            throw Fault("queue-misuse", where() + " uses a tensor of " + allocation.owner + " after FreeTensor");
        }
        if (offset < allocation.begin || offset + length > allocation.begin + allocation.size) {
            throw Fault("local-out-of-range",
                        where() + ": bytes " + text(offset) + ".." + text(offset + length) + " of " + memory.name +
                            " leave the buffer of " + allocation.owner + " (" + text(allocation.begin) + ".." +
                            text(allocation.begin + allocation.size) + ")");
        }
        for (uint32_t b = offset / kBlockBytes; b * kBlockBytes < offset + length; ++b) {
            check(memory, b, how, needs_data);
        }
        return memory.bytes.data() + offset;
    }

    std::string where() const {
        return label() + ", " + instruction + " on pipe " + pipe_name(current_pipe) + " (its " +
               text(sequence()) + ". instruction)";
    }

    Machine &machine;
    const Chip &chip;
    const int id;
    const Kind kind;
    const int group, sub;
    LocalMemory ub, l1, l0a, l0b, l0c;
    Counters counters;
    std::array<Knowledge, kPipes> knows;
    std::array<double, kPipes> busy{};  // cycles
    std::array<double, kPipes> drained{};
    std::array<uint32_t, kPipes> issued{};
    std::map<std::pair<int, int>, std::deque<Knowledge>> events;  // (pair of pipes, id)
    std::map<std::pair<int, int>, bool> allocated_events;         // those that AllocEventID gave, by the same key
    std::array<std::deque<Knowledge>, kFlagIds> flags;            // cross-core flags, ready to be waited for
    std::array<std::deque<Knowledge>, kFlagIds> flags_set;        // reported by this core, not yet by its peers
    const char *instruction = "nothing";
    int current_pipe = PIPE_S;

private:
    void check(LocalMemory &memory, uint32_t index, Direction how, bool needs_data) {
        LocalMemory::Block &block = memory.blocks[index];
        if (how == Direction::read) {
            if (needs_data && !block.initialised) {
                throw Fault("uninitialised-read", where() + " reads " + place(memory, index) + ", which nothing wrote");
            }
            if (!ordered(block.write, false)) complain(memory, index, "reads", block.write, "wrote");
            block.reads[current_pipe] = sequence();
            return;
        }
        for (int pipe = 0; pipe < kPipes; ++pipe) {
            // One pipe reads and writes in the order of its instructions, so only other pipes' reads matter.
            const Access read{block.reads[pipe] ? id : -1, pipe, block.reads[pipe]};
            if (!ordered(read, true)) complain(memory, index, "writes", read, "reads");
            block.reads[pipe] = 0;
        }
        if (!ordered(block.write, false)) complain(memory, index, "writes", block.write, "wrote");
        block.write = {id, current_pipe, sequence()};
        block.initialised = true;
    }

    std::string place(const LocalMemory &memory, uint32_t index) const {
        return memory.name + " at byte " + text(static_cast<uint64_t>(index) * kBlockBytes);
    }

    [[noreturn]] void complain(const LocalMemory &memory, uint32_t index, const char *verb, const Access &other,
                               const char *other_verb) const {
        const bool same = other.pipe == current_pipe;
        throw Fault(same ? "missing-barrier" : "missing-flag",
                    where() + " " + verb + " " + place(memory, index) + ", which instruction " + text(other.sequence) +
                        " of pipe " + pipe_name(other.pipe) + " " + other_verb + "; nothing orders them" +
                        (same ? " (PipeBarrier)" : " (SetFlag/WaitFlag or a queue step)"));
    }

    uint32_t scalar_version = 0;
    std::array<uint32_t, kPipes> scalar_version_seen{};
};

Core &current_core();

}  // namespace ascendc_emulator
