// Memories and who touched them last: bounds, initialisation, and order between pipes and cores.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "chip.h"
#include "clock.h"
#include "fault.h"

namespace ascendc_emulator {

class Core;

// The state of the buffer that a LocalTensor is a view of.
struct Allocation {
    enum class State { free, held, queued } state = State::held;
    std::string owner;
    uint32_t begin = 0, size = 0;
};

// One on-chip memory of one core. Order is tracked for each 32-byte block.
struct LocalMemory {
    struct Block {
        Access write;
        uint32_t reads[kPipes] = {};
        bool initialised = false;
    };

    std::string name;
    uint32_t capacity = 0, used = 0;
    std::vector<uint8_t> bytes;
    std::vector<Block> blocks;

    void configure(const char *label, uint32_t size) {
        name = label;
        capacity = size;
        bytes.assign(size, 0xCD);
        blocks.assign(size / kBlockBytes, Block{});
    }
};

enum class Storage { input, output, workspace };

// A buffer of global memory. Inputs may be streamed from HBM; the workspace is small enough to stay in L2.
struct GlobalBuffer {
    struct Record {
        uint32_t begin, end;  // bytes within the block
        Access access;
        bool write;
    };

    std::string name;
    uint8_t *base = nullptr;
    uint64_t size = 0;
    Storage storage = Storage::input;
    bool streamed = false;  // read once from HBM; otherwise taken to hit L2
    std::vector<std::vector<Record>> records;
    std::vector<bool> initialised;

    GlobalBuffer(std::string label, void *data, uint64_t bytes, Storage kind, bool from_hbm)
        : name(std::move(label)), base(static_cast<uint8_t *>(data)), size(bytes), storage(kind), streamed(from_hbm) {
        if (storage != Storage::input) {
            records.resize((size + kBlockBytes - 1) / kBlockBytes);
            initialised.assign(records.size(), false);
        }
    }
};

}  // namespace ascendc_emulator
