// What a kernel did: instructions by name, bytes by path, estimated cycles.
#pragma once

#include <cstdint>
#include <map>
#include <ostream>
#include <string>

namespace ascendc_emulator {

struct Counters {
    std::map<std::string, uint64_t> calls;           // API calls, split where the hardware's repeat limit splits them
    std::map<std::string, uint64_t> vector_repeats;  // vector instructions of 256 bytes, masked ones included
    std::map<std::string, uint64_t> bytes;           // by path, for example "HBM->UB"
    std::map<std::string, double> busy;              // the busiest core's cycles, by pipe
    double cycles = 0;                               // the slowest core's estimated end

    void add(const Counters &other) {
        for (const auto &[key, value] : other.calls) calls[key] += value;
        for (const auto &[key, value] : other.vector_repeats) vector_repeats[key] += value;
        for (const auto &[key, value] : other.bytes) bytes[key] += value;
        for (const auto &[key, value] : other.busy) busy[key] = busy[key] < value ? value : busy[key];
        cycles = cycles < other.cycles ? other.cycles : cycles;
    }

    // JSON, so that tests and the estimate read it without a parser of their own.
    void write(std::ostream &out) const {
        const auto table = [&out](const char *name, const auto &values) {
            out << "\"" << name << "\": {";
            const char *separator = "";
            for (const auto &[key, value] : values) {
                out << separator << "\"" << key << "\": " << value;
                separator = ", ";
            }
            out << "}, ";
        };
        out << "{";
        table("calls", calls);
        table("vector_repeats", vector_repeats);
        table("bytes", bytes);
        table("busy", busy);
        out << "\"cycles\": " << cycles << "}\n";
    }
};

}  // namespace ascendc_emulator
