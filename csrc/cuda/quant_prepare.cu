// The packed format, the same for every device, to the tiles of quant_linear.h. It runs on the host, once, when a weight is loaded.
#include <cstring>

#include "quant_linear.h"

namespace kd::cuda {

QuantLayout quant_layout(const Packed& p) {
  const int64_t all = packed_round_up(p.columns, kCodeRun);
  const bool by_block = p.group == Group::kBlock && p.bits == 8 && p.group_size < all;
  return {p.rows, p.columns, by_block ? p.group_size : all, p.bits, !p.symmetric && !p.two_level(), p.group == Group::kIn};
}

int64_t quant_weights(const QuantLayout& layout, const uint8_t* base, QuantWeights& w) {
  w = {};
  w.rows = layout.rows;
  w.columns = layout.columns;
  w.depth = packed_round_up(layout.columns, kTileColumns);
  w.panels = (layout.rows + kPanelRows - 1) / kPanelRows;
  w.segment = layout.segment;
  w.segments = (layout.columns + layout.segment - 1) / layout.segment;
  w.bits = layout.bits;
  int64_t at = 0;
  const auto section = [&](int64_t bytes) {
    const uint8_t* begin = base + at;
    at += packed_round_up(bytes, kPackedAlign);
    return begin;
  };
  const int64_t padded = w.panels * kPanelRows;
  w.codes = section(w.panels * (w.depth / kTileColumns) * tile_bytes(w.bits));
  w.scales = reinterpret_cast<const float*>(section(w.segments * padded * 4));
  if (layout.has_zeros) {
    w.zeros = reinterpret_cast<const int32_t*>(section(w.segments * padded * 4));
    w.column_zeros = reinterpret_cast<const int8_t*>(section(w.depth));
  }
  if (layout.has_column_scales) w.column_scales = reinterpret_cast<const float*>(section(w.depth * 4));
  return at;
}

namespace {

// A row's run of 32 columns into its tile, of which it is `half`.
void place_run(const Packed& p, int64_t row, int64_t run, uint8_t* tile) {
  const int64_t half = run % 2, in_panel = row % kPanelRows, bytes = 4 * p.bits;
  const uint8_t* codes = p.codes + row * p.row_bytes() + run * bytes;
  if (p.bits < 8) {
    std::memcpy(tile + (half * kPanelRows + in_panel) * bytes, codes, bytes);
    tile[code_bytes(p.bits) + half * kPanelRows + in_panel] = step_of(p, row, run);
    return;
  }
  for (int64_t i = 0; i < kCodeRun; ++i) {
    if (run * kCodeRun + i >= p.columns) return;
    const int64_t chunk = (half * 2 + i / 16) ^ (in_panel / 2 % 4);
    tile[in_panel * kTileColumns + chunk * 16 + i % 16] = static_cast<uint8_t>(codes[i] - 128);
  }
}

}  // namespace

void quant_prepare(const Packed& p, uint8_t* prepared) {
  QuantWeights w;
  std::memset(prepared, 0, quant_weights(quant_layout(p), prepared, w));
  uint8_t* codes = const_cast<uint8_t*>(w.codes);
  float* scales = const_cast<float*>(w.scales);
  int32_t* zeros = const_cast<int32_t*>(w.zeros);
  const int64_t padded = w.panels * kPanelRows, tiles = w.depth / kTileColumns;
  const int32_t middle = 1 << (p.bits - 1);
  const bool by_column = p.group == Group::kIn;
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t segment = 0; segment < w.segments; ++segment) {
      const int64_t scale = scale_index(p, row, segment * w.segment), at = segment * padded + row;
      scales[at] = by_column ? 1 : scale_at(p, scale);
      if (zeros) zeros[at] = by_column ? 1 : p.zeros[scale] - middle;
    }
    for (int64_t run = 0; run * kCodeRun < p.columns; ++run) {
      const int64_t tile = row / kPanelRows * tiles + run * kCodeRun / kTileColumns;
      place_run(p, row, run, codes + tile * tile_bytes(p.bits));
    }
  }
  for (int64_t column = 0; column < p.columns; ++column) {
    if (w.column_scales) const_cast<float*>(w.column_scales)[column] = scale_at(p, column / p.group_size);
    if (zeros) const_cast<int8_t*>(w.column_zeros)[column] = static_cast<int8_t>(by_column ? p.zeros[column / p.group_size] - middle : 1);
  }
}

}  // namespace kd::cuda
