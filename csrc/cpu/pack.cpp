#include "pack.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr int kGroupRows = 4;
constexpr std::int64_t kQuadsAtOnce = 32;  // 4 KiB of output, which stays in L1 while it is filled group by group
constexpr std::int64_t kLeastPanelsPerThread = 4;

// Four codes of one row, those beyond `available` as zero.
inline std::uint32_t load_quad(const std::uint8_t* row, std::int64_t available) {
  std::uint32_t quad = 0;
  std::memcpy(&quad, row, static_cast<std::size_t>(std::min<std::int64_t>(4, available)));
  return quad;
}

inline std::uint32_t load_whole_quad(const std::uint8_t* row) {
  std::uint32_t quad;
  std::memcpy(&quad, row, sizeof quad);
  return quad;
}

// k, k + 1, k + 2, k + 3 to k, k + 2, k + 1, k + 3.
inline std::uint32_t swap_middle(std::uint32_t quad) {
  return (quad & 0xff0000ffu) | (quad >> 8 & 0x0000ff00u) | (quad << 8 & 0x00ff0000u);
}

// The high bit of each byte that is 0x7f or 0xff.
inline std::uint32_t nan_bits(std::uint32_t quad) { return ((quad & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u; }

// One panel; returns whether it holds NaN.
bool pack_panel(const std::uint8_t* weight, std::int64_t k, const Panel& panel, std::uint8_t* codes) {
  const std::int64_t quads = ceil_div(k, 4);
  const std::int64_t whole_quads = k / 4;
  std::uint32_t nan = 0;
  for (std::int64_t first = 0; first < quads; first += kQuadsAtOnce) {
    const std::int64_t last = std::min(first + kQuadsAtOnce, quads);
    const std::int64_t last_whole = std::min(last, whole_quads);
    for (int group = 0; group < kPanelRows / kGroupRows; ++group) {
      const int rows = std::clamp(panel.rows - group * kGroupRows, 0, kGroupRows);
      const std::uint8_t* source = weight + (panel.first_row + group * kGroupRows) * k;
      std::uint8_t* out = codes + group * 4 * kGroupRows;
      std::int64_t quad = first;
      if (rows == kGroupRows) {
        for (; quad < last_whole; ++quad) {
          std::uint32_t group_quads[kGroupRows];
          for (int row = 0; row < kGroupRows; ++row) {
            const std::uint32_t in = load_whole_quad(source + row * k + quad * 4);
            nan |= nan_bits(in);
            group_quads[row] = swap_middle(in);
          }
          std::memcpy(out + quad * kQuadBytes, group_quads, sizeof group_quads);
        }
      }
      for (; quad < last; ++quad) {
        std::uint32_t group_quads[kGroupRows] = {};
        for (int row = 0; row < rows; ++row) {
          const std::uint32_t in = load_quad(source + row * k + quad * 4, k - quad * 4);
          nan |= nan_bits(in);
          group_quads[row] = swap_middle(in);
        }
        std::memcpy(out + quad * kQuadBytes, group_quads, sizeof group_quads);
      }
    }
  }
  return nan != 0;
}

}  // namespace

void pack_weight(const std::uint8_t* weight, std::int64_t k, Panel* panels, std::int64_t panel_count,
                 std::uint8_t* codes) {
  const std::int64_t panel_bytes = ceil_div(k, 4) * kQuadBytes;
  parallel(panel_count, kLeastPanelsPerThread, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t panel = begin; panel < end; ++panel) {
      panels[panel].has_nan = pack_panel(weight, k, panels[panel], codes + panel * panel_bytes) ? 1 : 0;
    }
  });
}

}  // namespace qwen3_fp8_ascend::cpu
