// What the emulator says when a kernel does something the hardware would not forgive.
#pragma once

#include <stdexcept>
#include <string>

namespace ascendc_emulator {

// A defect of the kernel. `name` is stable, tests match on it; `what()` says where and how.
class Fault : public std::runtime_error {
public:
    Fault(std::string name, const std::string &detail)
        : std::runtime_error(name + ": " + detail), name_(std::move(name)) {}
    const std::string &name() const { return name_; }

private:
    std::string name_;
};

// Unwinds the other cores' threads after one of them has failed; never reported.
struct Aborted {};

inline void require(bool holds, const char *name, const std::string &detail) {
    if (!holds) {
        throw Fault(name, detail);
    }
}

inline std::string text(uint64_t value) { return std::to_string(value); }

}  // namespace ascendc_emulator
