// Products with a decoded strip by fp32 multiply-adds.
//
// x is repeated in pairs to match a group of weights; each output is one chain of multiply-adds for even k and one for
// odd k, added at the end of a chunk. So a row's bits depend on no other row, and not on how many there are.
//
// Where another program uses the same core's units, it is the number of instructions that decides, not that of the
// multiply-adds. The loops are written for few of them beside: all that a turn needs is addressed from two counters,
// and nothing is read from the stack or through a pointer that a store could change.
#pragma once

#include <type_traits>

#include "decode_fp16.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

// Rows of a tile over a strip of so many groups.
template <int Groups>
constexpr int kTileRows = kSums / Groups;

// What a strip is multiplied with and added to.
struct Operands {
  std::int64_t quads;
  const float (*x)[kChunk];
  const float* x_scale;
  float w_scale;
  float (*sums)[kPanelRows];  // from the strip's first weight row on

  Operands from_row(std::int64_t row) const { return {quads, x + row, x_scale + row, w_scale, sums + row}; }
};

// Where a loop over quads is, in bytes: of a row of activations, and of a strip as fp16.
struct Place {
  static constexpr std::int64_t kStepX = 4 * sizeof(float);

  std::int64_t x = 0;
  std::int64_t half = 0;

  template <int Groups>
  static constexpr std::int64_t kStepHalf =
      2 * Groups * kGroupNumbers * static_cast<std::int64_t>(sizeof(std::uint16_t));

  template <int Groups>
  [[gnu::always_inline]] Place next() const {
    return {x + kStepX, half + kStepHalf<Groups>};
  }

  template <int Groups>
  [[gnu::always_inline]] void advance(int quads) {
    x += quads * kStepX;
    half += quads * kStepHalf<Groups>;
    asm("" : "+r"(x), "+r"(half));  // g++ would replace them by a pointer for each operand
  }
};

template <class T>
[[gnu::always_inline]] inline T* at_byte(T* first, std::int64_t offset) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + offset);
}

// What is done beside the products of a strip, quad by quad, so that it takes none of their time: nothing, prefetching,
// or decoding. Inlined always: g++ drops calls of a function that does nothing but prefetch.
struct Nothing {
  static constexpr bool kReadsMasks = false;

  template <int Groups>
  [[gnu::always_inline]] void beside(const Place&) const {}
};

// Codes that will be wanted soon: as many as a strip has, in the order of memory, in equal parts from each place. With
// a second distance, those that will be wanted later too, into L2.
template <int Places, int Distances>
struct Prefetch {
  static constexpr bool kReadsMasks = false;

  const std::uint8_t* codes[Distances][Places];

  template <int Groups>
  [[gnu::always_inline]] void beside(const Place& place) const {
    constexpr int kPart = Groups * kGroupBytes / Places;
    const std::int64_t from = place.x * (kPart / Place::kStepX);
#pragma GCC unroll 2
    for (int p = 0; p < Places; ++p) {
#pragma GCC unroll 2
      for (int at = 0; at < kPart; at += kLine) {
        _mm_prefetch(reinterpret_cast<const char*>(codes[0][p] + from + at), _MM_HINT_T0);
        if constexpr (Distances > 1) {
          _mm_prefetch(reinterpret_cast<const char*>(codes[1][p] + from + at), _MM_HINT_T1);
        }
      }
    }
  }
};

// The next strip to multiply, which has as many quads and no NaN, and prefetching of a later one. `Masks` points to the
// decoder's constants, or holds them.
template <class Masks, class Later>
struct DecodeNextBy {
  static constexpr bool kReadsMasks = std::is_pointer_v<Masks>;

  const std::uint8_t* codes;
  std::uint16_t* out;
  Masks masks;
  Later later;

  template <int Groups>
  [[gnu::always_inline]] void beside(const Place& place) const {
    later.template beside<Groups>(place);
    decode_quad<false, Groups>(codes + place.x * (kQuadBytes / Place::kStepX), *masks, at_byte(out, place.half));
  }
};

template <class Later>
using DecodeNext = DecodeNextBy<const DecodeMasks*, Later>;

// The constants themselves. g++ copies DecodeMasks in halves of registers, and a load of both waits for their stores.
struct HeldMasks {
  Words to_top;
  Words number;

  [[gnu::always_inline]] DecodeMasks operator*() const { return {to_top, number}; }
};

// Where weights come from: a strip as fp16, which is widened while it is loaded; the same, and what was widened is kept
// for other rows; what was kept.
struct Half {
  const std::uint16_t* strip;

  [[gnu::always_inline]] Numbers load(const Place& place, int group) const {
    return widen_fp16(at_byte(strip, place.half) + group * kGroupNumbers);
  }
};

struct HalfAndKeep {
  const std::uint16_t* strip;
  float* kept;

  [[gnu::always_inline]] Numbers load(const Place& place, int group) const {
    const Numbers w = widen_fp16(at_byte(strip, place.half) + group * kGroupNumbers);
    store_numbers(at_byte(kept, 2 * place.half) + group * kGroupNumbers, w);
    return w;
  }
};

struct Kept {
  const float* strip;

  [[gnu::always_inline]] Numbers load(const Place& place, int group) const {
    return load_numbers(at_byte(strip, 2 * place.half) + group * kGroupNumbers);
  }
};

// One pair of k, the first or the second of a quad: whichever is less, activations or weights, is kept in registers.
template <int Pair, int Rows, int Groups, class Weights>
[[gnu::always_inline]] inline void multiply_pair(const Weights& weights, const float* x, const Place& place,
                                                 Numbers (&partial)[Rows][Groups]) {
  const float* pair = at_byte(x, place.x) + 2 * Pair;
  if constexpr (Rows <= Groups) {
    Numbers value[Rows];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) value[r] = repeat_pair(pair + r * kChunk);
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g) {
      const Numbers w = weights.load(place, Pair * Groups + g);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) partial[r][g] = fused(w, value[r], partial[r][g]);
    }
  } else {
    Numbers w[Groups];
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g) w[g] = weights.load(place, Pair * Groups + g);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const Numbers value = repeat_pair(pair + r * kChunk);
#pragma GCC unroll 8
      for (int g = 0; g < Groups; ++g) partial[r][g] = fused(w[g], value, partial[r][g]);
    }
  }
}

// sum += (partial * 2^8) * x_scale * w_scale.
template <int Rows, int Groups>
[[gnu::always_inline]] inline void scale_and_add(const Numbers (&partial)[Rows][Groups], const Operands& o) {
  const Numbers w_scale = all(o.w_scale);
  const float* x_scale = o.x_scale;
  float* sums = o.sums[0];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < Groups; g += 2) {
      const Numbers sum_of_pairs = add_pairs(partial[r][g], partial[r][g + 1]);
      const Numbers exact = multiply(sum_of_pairs, all(kDecodeFactor));
      const Numbers scaled = multiply(exact, all(x_scale[r]));
      float* sum = sums + r * kPanelRows + g * kGroupRows;
      store_numbers(sum, fused(scaled, w_scale, load_numbers(sum)));
    }
  }
}

template <int Rows, int Groups>
[[gnu::always_inline]] inline void clear(Numbers (&partial)[Rows][Groups]) {
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g) partial[r][g] = zero();
  }
}

// All quads of a strip, and what is done beside them.
template <int Rows, int Groups, class Weights, class Work>
[[gnu::always_inline]] inline void multiply_quads(const Operands& o, const Weights& weights, const Work& work) {
  const float* x = o.x[0];
  const std::int64_t end = o.quads * Place::kStepX;
  Numbers partial[Rows][Groups];
  clear(partial);
  const auto multiply_quad = [&](const Place& at) __attribute__((always_inline)) {
    work.template beside<Groups>(at);
    multiply_pair<0>(weights, x, at, partial);
    multiply_pair<1>(weights, x, at, partial);
  };
  Place place;
  for (; place.x + Place::kStepX < end; place.advance<Groups>(2)) {
    multiply_quad(place);
    multiply_quad(place.next<Groups>());
  }
  if (place.x < end) multiply_quad(place);
  scale_and_add(partial, o);
}

// `Rows` rows times a strip, scaled and added to the sums. Not inlined, and with copies of what it is given: its loop
// gets all registers. Few sums leave some for the decoder's constants.
template <int Rows, int Groups, class Weights, class Work>
[[gnu::noinline]] void multiply_strip(const Operands& o, const Weights& given_weights, const Work& given_work) {
  const Weights weights = given_weights;
  if constexpr (Work::kReadsMasks && Rows * Groups <= kSumsBesideConstants) {
    const HeldMasks masks{given_work.masks->to_top, given_work.masks->number};
    const DecodeNextBy<HeldMasks, decltype(given_work.later)> work{given_work.codes, given_work.out, masks,
                                                                   given_work.later};
    multiply_quads<Rows, Groups>(o, weights, work);
  } else {
    const Work work = given_work;
    multiply_quads<Rows, Groups>(o, weights, work);
  }
}

// How a batch is cut into tiles: the groups of a strip, the least rows that a tile has, whether one tile has them all.
template <int Groups, int LeastRows, bool One>
struct Tiles {
  static constexpr int kGroupsOfStrip = Groups;
  static constexpr int kLeastRows = LeastRows;
  static constexpr bool kOne = One;
};

// Few rows need more groups for the multiplier to be busy; with fewer groups, more rows share a weight that is loaded.
using FewRows = Tiles<4, 2, true>;
using ManyRows = Tiles<2, kTileRows<2> / 2, false>;
using LongBatch = Tiles<4, kTileRows<4> / 2, false>;

// Tiles of a batch have as many rows as each other, or one more: a multiply-add takes four cycles and two begin in
// each, so that less than eight sums leave the multiplier idle.
template <int Groups>
std::int64_t tile_rows(std::int64_t rows) {
  constexpr std::int64_t kMost = kTileRows<Groups>;
  return rows <= kMost ? rows : ceil_div(rows, ceil_div(rows, kMost));
}

// Calls body(std::integral_constant<int, number>) for a number within [Least, Most].
template <int Least, int Most, class Body>
[[gnu::always_inline]] inline void with_number(std::int64_t number, const Body& body) {
  if constexpr (Least == Most) {
    body(std::integral_constant<int, Most>());
  } else if (number == Least) {
    body(std::integral_constant<int, Least>());
  } else {
    with_number<Least + 1, Most>(number, body);
  }
}

// The first of `rows` rows, as many as a tile has, times a strip; returns how many.
template <class Tiles, class Weights, class Work>
std::int64_t multiply_tile(const Operands& o, std::int64_t rows, const Weights& weights, const Work& work) {
  constexpr int kOfStrip = Tiles::kGroupsOfStrip;
  const std::int64_t taken = tile_rows<kOfStrip>(rows);
  with_number<Tiles::kLeastRows, kTileRows<kOfStrip>>(taken, [&](auto number) __attribute__((always_inline)) {
    multiply_strip<decltype(number)::value, kOfStrip>(o, weights, work);
  });
  return taken;
}

// One row: each quad is decoded, into `half`, while the one before it is multiplied.
template <bool HasNan, class Ahead>
[[gnu::noinline]] void multiply_row(const Operands& o, const std::uint8_t* codes, std::uint16_t* half,
                                    const Ahead& given_ahead) {
  const DecodeMasks masks;
  const Ahead ahead = given_ahead;
  const Half weights{half};
  const float* x = o.x[0];
  const std::int64_t last = (o.quads - 1) * Place::kStepX;
  Numbers partial[1][kGroups];
  clear(partial);
  decode_quad<HasNan, kGroups>(codes, masks, half);
  Place place;
  for (; place.x < last; place.advance<kGroups>(1)) {
    ahead.template beside<kGroups>(place);
    decode_quad<HasNan, kGroups>(codes + kQuadBytes + place.x * (kQuadBytes / Place::kStepX), masks,
                                 at_byte(half, place.half) + 2 * kGroups * kGroupNumbers);
    multiply_pair<0>(weights, x, place, partial);
    multiply_pair<1>(weights, x, place, partial);
  }
  ahead.template beside<kGroups>(place);
  multiply_pair<0>(weights, x, place, partial);
  multiply_pair<1>(weights, x, place, partial);
  scale_and_add(partial, o);
}

// The multiplier's limit: as many chains as a tile has, and nothing else. 1 = 0.5 * 1 + 0.5 stays an ordinary number.
inline void multiply_add(std::int64_t count) {
  const Numbers half = all(0.5f);
  Numbers chain[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) chain[i] = all(1.0f);
  for (std::int64_t done = 0; done < count; done += kSums * kLanes) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      chain[i] = fused(chain[i], half, half);
      asm volatile("" : "+v"(chain[i]));  // the result is wanted, as far as the compiler knows
    }
  }
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
