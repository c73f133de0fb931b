// What a kernel did: instructions by name, bytes by path, estimated cycles.
#pragma once

#include <cstdint>
#include <map>
#include <ostream>
#include <string>
#include <string_view>

namespace ascendc_emulator {

// Numbers by name. Every instruction counts, so a name that is known is found without making a string of it.
template <class T>
class Table {
public:
    T &operator[](std::string_view name) {
        const auto found = rows_.find(name);
        return found != rows_.end() ? found->second : rows_.emplace(name, T{}).first->second;
    }
    auto begin() const { return rows_.begin(); }
    auto end() const { return rows_.end(); }

private:
    std::map<std::string, T, std::less<>> rows_;
};

struct Counters {
    Table<uint64_t> calls;           // API calls, split where the hardware's repeat limit splits them
    Table<uint64_t> vector_repeats;  // vector instructions of 256 bytes, masked ones included
    Table<uint64_t> bytes;           // by path, for example "HBM->UB"
    Table<double> busy;              // the busiest core's cycles, by pipe
    double cycles = 0;               // the slowest core's estimated end

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
