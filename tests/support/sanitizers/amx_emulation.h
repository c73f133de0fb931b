// The tile instructions that csrc/cpu/amx.cpp uses, in AVX-512, so that its kernels run on processors without AMX and
// the sanitizers see every byte that a tile load reads. Included before everything else (-include).
//
// TDPBF16PS as in the Intel SDM, volume 2: for each k of A, the even and the odd product are added to two fp32 sums by
// fused multiply-adds; their sum is then added to C. Subnormals count as zero everywhere. Misuse that would raise #UD or
// #GP ends the process.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_amx::load_config
#define _tile_release emulated_amx::release
#define _tile_zero emulated_amx::zero
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_dpbf16ps emulated_amx::multiply

namespace emulated_amx {
namespace {

constexpr int kTiles = 8;
constexpr int kMostRows = 16;
constexpr int kRowBytes = 64;

struct Tile {
  int rows = 0;
  int row_bytes = 0;
  alignas(64) std::uint32_t data[kMostRows][kRowBytes / 4] = {};
};

struct Registers {
  bool configured = false;
  Tile tiles[kTiles];
};

thread_local Registers registers;

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline Tile& tile(int index) {
  require(registers.configured, "a tile is used before it is configured");
  require(index >= 0 && index < kTiles && registers.tiles[index].rows > 0, "a tile is used that has no rows");
  return registers.tiles[index];
}

// The memory format of LDTILECFG: palette, start row, 14 reserved bytes, 16 row widths, 16 row counts.
inline void load_config(const void* memory) {
  std::uint8_t bytes[64];
  std::memcpy(bytes, memory, sizeof bytes);
  require(bytes[0] == 1, "the palette must be 1");
  for (int i = 1; i < 16; ++i) require(bytes[i] == 0, "a reserved byte of the configuration is not zero");
  for (int i = 0; i < kTiles; ++i) {
    std::uint16_t width = 0;
    std::memcpy(&width, bytes + 16 + 2 * i, sizeof width);
    require(width <= kRowBytes && bytes[48 + i] <= kMostRows, "a tile is larger than 16 rows of 64 bytes");
    registers.tiles[i] = Tile{};
    registers.tiles[i].rows = bytes[48 + i];
    registers.tiles[i].row_bytes = width;
  }
  registers.configured = true;
}

inline void release() { registers = Registers{}; }

inline void zero(int index) { std::memset(tile(index).data, 0, sizeof registers.tiles[index].data); }

inline void load(int index, const void* base, std::int64_t stride) {
  Tile& out = tile(index);
  std::memset(out.data, 0, sizeof out.data);
  for (int row = 0; row < out.rows; ++row) {
    std::memcpy(out.data[row], static_cast<const char*>(base) + row * stride, static_cast<std::size_t>(out.row_bytes));
  }
}

inline void store(int index, void* base, std::int64_t stride) {
  const Tile& in = tile(index);
  for (int row = 0; row < in.rows; ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, in.data[row], static_cast<std::size_t>(in.row_bytes));
  }
}

// Flushes subnormals for as long as it lives.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }  // FTZ, DAZ
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned before_;
};

inline __m512 bf16_at_even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 bf16_at_odd(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline void multiply(int sum, int left, int right) {
  Tile& c = tile(sum);
  const Tile& a = tile(left);
  const Tile& b = tile(right);
  require(c.rows == a.rows && a.row_bytes == 4 * b.rows && c.row_bytes == b.row_bytes, "tiles do not fit each other");
  const FlushSubnormals flush;
  for (int m = 0; m < c.rows; ++m) {
    __m512 even = _mm512_setzero_ps();
    __m512 odd = _mm512_setzero_ps();
    for (int k = 0; k < b.rows; ++k) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(a.data[m][k]));
      const __m512i columns = _mm512_load_si512(b.data[k]);
      even = _mm512_fmadd_ps(bf16_at_even(pair), bf16_at_even(columns), even);
      odd = _mm512_fmadd_ps(bf16_at_odd(pair), bf16_at_odd(columns), odd);
    }
    const __m512 products = _mm512_add_ps(even, odd);
    _mm512_store_ps(c.data[m], _mm512_add_ps(_mm512_load_ps(c.data[m]), products));
  }
}

}  // namespace
}  // namespace emulated_amx
