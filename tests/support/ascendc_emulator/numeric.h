// half and bfloat16 with the rounding modes of the vector unit's Cast.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

using half = _Float16;

// Storage only: the vector unit of these chips has no bf16 arithmetic, it converts to and from float.
struct bfloat16_t {
    uint16_t bits;
};

namespace ascendc_emulator {

template <class To, class From>
To bit_cast(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float widen(half x) { return static_cast<float>(x); }
inline float widen(bfloat16_t x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(float x) { return x; }

inline half to_half_nearest_even(float x) { return static_cast<half>(x); }

// Round to odd: truncate toward zero and set the last bit if anything was lost. A later rounding to fewer
// bits is then correct, which two roundings to nearest are not.
inline half to_half_odd(float x) {
    if (std::isnan(x) || std::isinf(x)) {
        return static_cast<half>(x);
    }
    half nearest = static_cast<half>(x);
    uint16_t bits = bit_cast<uint16_t>(nearest);
    if (std::fabs(widen(nearest)) > std::fabs(x)) {
        bits = static_cast<uint16_t>(bits - 1);  // also from infinity down to the largest finite number
    }
    if (widen(bit_cast<half>(bits)) != x) {
        bits = static_cast<uint16_t>(bits | 1u);
    }
    return bit_cast<half>(bits);
}

inline half to_half_toward_zero(float x) {
    half nearest = static_cast<half>(x);
    if (!std::isnan(x) && !std::isinf(x) && std::fabs(widen(nearest)) > std::fabs(x)) {
        return bit_cast<half>(static_cast<uint16_t>(bit_cast<uint16_t>(nearest) - 1));
    }
    return nearest;
}

inline bfloat16_t to_bfloat16_nearest_even(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (std::isnan(x)) {
        return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    }
    return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace ascendc_emulator
