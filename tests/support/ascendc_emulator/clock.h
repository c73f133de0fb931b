// Order: what each pipe knows to be complete. A vector clock over all pipes of all cores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "qualifiers.h"

namespace ascendc_emulator {

constexpr int kPipes = 7;

inline const char *pipe_name(int pipe) {
    static const char *names[] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX", "ALL"};
    return names[pipe];
}

// For every (core, pipe) the number of its instructions that are known to be complete, and when (in cycles).
struct Knowledge {
    std::vector<uint32_t> complete;
    double time = 0;

    void join(const Knowledge &other) {
        for (size_t i = 0; i < complete.size(); ++i) {
            complete[i] = std::max(complete[i], other.complete[i]);
        }
        time = std::max(time, other.time);
    }
};

struct Access {
    int core = -1;  // -1: never
    int pipe = 0;
    uint32_t sequence = 0;
};

}  // namespace ascendc_emulator
