// half and bfloat16 with the rounding modes of the vector unit's Cast.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

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

// IEEE binary16 and binary32; to the nearest, ties to even; NaN keeps what fits of its payload and becomes quiet. The
// same bits with F16C's instructions and without.
inline uint16_t narrow(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
    uint32_t narrowed;
    if (magnitude > 0x7F800000u) {
        narrowed = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
    } else if (magnitude >= 0x477FF000u) {  // what rounds to 2^16
        narrowed = 0x7C00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: the last bit of a number around 1/2 is 2^-24, as half's subnormals'
        narrowed = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    } else {
        narrowed = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return static_cast<uint16_t>(sign | narrowed);
#endif
}

inline float widen(uint16_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
    if (magnitude < 0x400u) {
        return bit_cast<float>(sign | bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
    }
    if (magnitude >= 0x7C00u) {
        return bit_cast<float>(sign | (magnitude << 13) | 0x7F800000u | (magnitude > 0x7C00u ? 0x400000u : 0u));
    }
    return bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
#endif
}

}  // namespace ascendc_emulator

// Each operation is rounded to half: the float in between is wide enough that this rounds once. (_Float16 would do, but is
// C++ from g++ 13 on only, and from 12 on x86.)
struct half {
    uint16_t bits;

    half() = default;
    explicit half(float x) : bits(ascendc_emulator::narrow(x)) {}
    operator float() const { return ascendc_emulator::widen(bits); }

    friend half operator-(half x) { return half(-static_cast<float>(x)); }
    friend half operator+(half a, half b) { return half(static_cast<float>(a) + static_cast<float>(b)); }
    friend half operator-(half a, half b) { return half(static_cast<float>(a) - static_cast<float>(b)); }
    friend half operator*(half a, half b) { return half(static_cast<float>(a) * static_cast<float>(b)); }
    friend half operator/(half a, half b) { return half(static_cast<float>(a) / static_cast<float>(b)); }
};
static_assert(sizeof(half) == 2 && std::is_trivially_copyable_v<half> && std::is_trivially_default_constructible_v<half>);

namespace ascendc_emulator {

inline float widen(half x) { return x; }
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
