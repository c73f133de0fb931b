// What a chip has and what an instruction costs. Every number says where it comes from; "assumed" means that no
// published figure was found, and that the figure matters only for the cycle estimate, never for results.
#pragma once

#include <cstdint>
#include <string>

#include "fault.h"

namespace ascendc_emulator {

constexpr uint32_t kBlockBytes = 32;     // DataBlock: the unit of strides and of alignment
constexpr uint32_t kRepeatBytes = 256;   // what the vector unit works on at once
constexpr uint32_t kMaxRepeats = 255;    // repeat counts are 8 bits wide
constexpr uint32_t kFractalBytes = 512;  // 16 x 16 elements of 16 bits
constexpr int kSubBlocks = 2;            // vector cores beside one cube core
constexpr int kFlagIds = 16;             // cross-core flags of a core
constexpr int kSyncAllFirst = 11, kSyncAllLast = 14;  // those that SyncAll uses
constexpr int kFlagLimit = 15;           // sets that may be outstanding
constexpr int kEventIds = 8;             // events of one pair of pipes
constexpr int kFreeEventIds = 6;         // 6 and 7 are the system's and TPipe's, unless AllocEventID gave them
constexpr int kCubePipeEvents = 3;       // M_MTE1 0 to 2, which TPipe sets on a cube core and waits for at its end

struct Chip {
    std::string name;
    uint32_t cube_cores;
    double mhz;
    double hbm_gb_per_s;  // nominal
    uint32_t ub, l1, l0a, l0b, l0c;

    static Chip named(const std::string &name);
};

// Sources: platform tables of CANN 8.1 and the vendor's specification pages; A3 is given per die.
inline Chip Chip::named(const std::string &name) {
    constexpr uint32_t kib = 1024;
    const Chip chips[] = {
        {"910B1", 24, 1850, 1600, 192 * kib, 512 * kib, 64 * kib, 64 * kib, 128 * kib},
        {"910B3", 20, 1800, 1600, 192 * kib, 512 * kib, 64 * kib, 64 * kib, 128 * kib},
        {"910B4", 20, 1500, 800, 192 * kib, 512 * kib, 64 * kib, 64 * kib, 128 * kib},
        {"910_9391", 24, 1850, 1600, 192 * kib, 512 * kib, 64 * kib, 64 * kib, 128 * kib},
    };
    for (const Chip &chip : chips) {
        if (chip.name == name) {
            return chip;
        }
    }
    throw Fault("unknown-chip", "no chip " + name + "; there are 910B1, 910B3, 910B4 and 910_9391 (dav-2201)");
}

// Cycles of the vector unit for one repeat (256 bytes), calibrated on 910B3 by PTO-ISA's cost model where that
// has a figure (two-operand 2, one-operand and scalar 1, Div 4), otherwise from the vendor's table of theoretical
// parallelism (Cast 64 or 128 elements, MulAddDst 32 floats, ReduceRepeat 64/7 floats a cycle).
struct VectorCost {
    static constexpr double one_operand = 1, two_operands = 2, divide = 4, cast = 1, multiply_add = 2, duplicate = 1;
    static constexpr double broadcast = 1, reduce_repeat = 7, reduce_block = 2;
    static constexpr double drain = 30;  // fixed cost, 20 to 43 cycles by instruction; paid where a result is awaited
};

// Bytes a cycle. A vector core gets half of its AI core's share of L2.
struct PathCost {
    static constexpr double l2_read_cube = 110, l2_read_vector = 55, l2_write_vector = 43, l2_write_cube = 86;
    // HBM is shared evenly by the cores that read it. The platform tables' 32 bytes a cycle and core are not applied: they
    // would cap a BF16 product on 20 cube cores at 1.15 TB/s, but not the 40 vector cores of ours.
    static constexpr double l1_to_l0a = 256, l1_to_l0b = 128;
    static constexpr double gm_latency = 400;             // assumed
    static constexpr double cross_core = 200;             // assumed
    static constexpr double scalar_issue = 2;             // assumed
    static constexpr double scalar_load = 20;             // assumed
    static constexpr double cube_head = 20;               // assumed
};

}  // namespace ascendc_emulator
