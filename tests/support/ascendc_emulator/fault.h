// What the emulator says when a kernel does something the hardware would not forgive.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

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

// `detail` is a text or, where every access comes by, a function that gives one: none is put together for nothing.
template <class Detail>
void require(bool holds, const char *name, const Detail &detail) {
    if (holds) return;
    if constexpr (std::is_invocable_v<const Detail &>) {
        throw Fault(name, detail());
    } else {
        throw Fault(name, detail);
    }
}

inline std::string text(uint64_t value) { return std::to_string(value); }

}  // namespace ascendc_emulator
