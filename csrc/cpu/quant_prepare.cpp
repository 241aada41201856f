// The packed format, the same for every device, to panels that the CPU kernels read in order. One layout serves every ISA: 16 output
// features by 4 columns are a vector of VNNI's operand and a row of AMX's, whose tiles of 64 columns then lie together in 1 KB. Rows 256
// bytes apart, 64 output features by 4 columns, cost tiles a third of their speed. Nothing is lost on the way, so that a weight need not
// be kept in both forms: quant_restore goes back.
#include <algorithm>
#include <cstring>

#include "quant_linear.h"

namespace kd::cpu {
namespace {

constexpr uint32_t kMagic = 0x5051444b, kPreparedVersion = 1;  // "KDQP"; it never leaves the process that made it

struct Header {
  uint32_t magic, version;
  int64_t rows, columns, segment;
  int32_t bits, has_zeros, has_column_scales;
};
static_assert(sizeof(Header) <= kPackedAlign);

// The sections behind a header: their pointers into `base`, and their whole size.
int64_t lay_out(const Header& header, const uint8_t* base, QuantWeights& w) {
  w = {};
  w.rows = header.rows;
  w.columns = header.columns;
  w.depth = packed_round_up(header.columns, kDepthAlign);
  w.panels = (header.rows + kPanelRows - 1) / kPanelRows;
  w.segment = header.segment;
  w.segments = (header.columns + header.segment - 1) / header.segment;
  w.bits = header.bits;
  int64_t at = kPackedAlign;
  const auto section = [&](int64_t bytes) {
    const uint8_t* begin = base + at;
    at += packed_round_up(bytes, kPackedAlign);
    return begin;
  };
  const int64_t padded = w.panels * kPanelRows;
  w.codes = section(padded * w.depth * w.bits / 8);
  if (w.bits < 8) w.steps = section(padded * w.depth / kCodeRun);
  w.scales = reinterpret_cast<const float*>(section(w.segments * padded * 4));
  w.starts = reinterpret_cast<const int32_t*>(section(w.segments * padded * 4));
  if (header.has_zeros) {
    w.zeros = reinterpret_cast<const int32_t*>(section(w.segments * padded * 4));
    w.column_zeros = reinterpret_cast<const int8_t*>(section(w.depth));
  }
  if (header.has_column_scales) w.column_scales = reinterpret_cast<const float*>(section(w.depth * 4));
  return at;
}

Header header_of(const Packed& p) {
  const bool by_block = p.group == Group::kBlock && p.bits == 8;
  const int64_t all = packed_round_up(p.columns, kCodeRun);
  return {kMagic,    kPreparedVersion, p.rows, p.columns, by_block ? std::min(p.group_size, all) : all, p.bits, p.has_zeros(),
          p.group == Group::kIn};
}

// Puts the 32 codes of a row into the vectors of its group: vector j has columns 4 * j to 4 * j + 3 (see quant_unpack.inl).
void place_low(int bits, const uint8_t* codes, int64_t lane, uint8_t* vectors) {
  for (int64_t k = 0; k < kCodeRun; ++k) {
    const int64_t vector = k / 4, byte = lane * 4 + k % 4;
    if (bits == 4) {
      vectors[vector % 4 * 64 + byte] |= static_cast<uint8_t>(codes[k] << (vector / 4 * 4));
    } else {
      vectors[vector % 2 * 64 + byte] |= static_cast<uint8_t>((codes[k] & 3) << (vector / 2 * 2));
      if (bits == 3) vectors[128 + byte] |= static_cast<uint8_t>((codes[k] >> 2) << vector);
    }
  }
}

// The codes that place_low put there.
void take_low(int bits, const uint8_t* vectors, int64_t lane, uint8_t* codes) {
  for (int64_t k = 0; k < kCodeRun; ++k) {
    const int64_t vector = k / 4, byte = lane * 4 + k % 4;
    if (bits == 4) {
      codes[k] = vectors[vector % 4 * 64 + byte] >> (vector / 4 * 4) & 15;
    } else {
      codes[k] = vectors[vector % 2 * 64 + byte] >> (vector / 2 * 2) & 3;
      if (bits == 3) codes[k] |= (vectors[128 + byte] >> vector & 1) << 2;
    }
  }
}

// A run of 32 codes as the packed format has it (core/packed.h), into bytes that are 0.
void pack_run(int bits, const uint8_t* codes, uint8_t* run) {
  for (int64_t i = 0; i < kCodeRun; ++i) {
    if (bits == 8) {
      run[i] = codes[i];
    } else if (bits == 4) {
      run[i % 16] |= static_cast<uint8_t>(codes[i] << (i / 16 * 4));
    } else {
      run[i % 8] |= static_cast<uint8_t>((codes[i] & 3) << (i / 8 * 2));
      if (bits == 3) run[8 + i % 4] |= static_cast<uint8_t>((codes[i] >> 2) << (i / 4));
    }
  }
}

}  // namespace

int64_t quant_prepared_bytes(const Packed& packed) {
  QuantWeights w;
  return lay_out(header_of(packed), nullptr, w);
}

void quant_prepare(const Packed& p, uint8_t* prepared) {
  const Header header = header_of(p);
  QuantWeights w;
  std::memset(prepared, 0, lay_out(header, prepared, w));
  std::memcpy(prepared, &header, sizeof(header));
  uint8_t* codes = const_cast<uint8_t*>(w.codes);
  uint8_t* steps = const_cast<uint8_t*>(w.steps);
  float* scales = const_cast<float*>(w.scales);
  int32_t* starts = const_cast<int32_t*>(w.starts);
  int32_t* zeros = const_cast<int32_t*>(w.zeros);
  const int64_t padded = w.panels * kPanelRows, middle = 1 << (p.bits - 1);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t group = row / kGroupRows, lane = row % kGroupRows;
    for (int64_t segment = 0; segment < w.segments; ++segment) {
      const int64_t scale = scale_index(p, row, segment * w.segment), at = segment * padded + row;
      scales[at] = p.group == Group::kIn ? 1 : scale_at(p, scale);
      if (zeros) zeros[at] = p.group == Group::kIn ? 1 : p.zeros[scale] - static_cast<int32_t>(middle);
    }
    for (int64_t run = 0; run * kCodeRun < p.columns; ++run) {
      const uint8_t step = p.bits == 8 ? 0 : step_of(p, row, run);
      const int times = p.bits == 8 ? 1 : step & ((1 << (8 - p.bits)) - 1);
      const int offset = p.bits == 8 ? 128 : times * ((step >> (8 - p.bits)) + static_cast<int>(middle)) >> 1;
      uint8_t run_codes[kCodeRun];
      int32_t sum = 0;
      for (int64_t i = 0; i < kCodeRun; ++i) {
        const int64_t column = run * kCodeRun + i;
        run_codes[i] = static_cast<uint8_t>(column < p.columns ? code_at(p, row, column) : middle);
        sum += times * run_codes[i] - offset;
      }
      starts[run * kCodeRun / w.segment * padded + row] -= 128 * sum;
      if (p.bits == 8) {
        uint8_t* to = codes + (group * w.depth + run * kCodeRun) * kGroupRows;
        for (int64_t i = 0; i < kCodeRun; ++i) to[(i / 4 * kGroupRows + lane) * 4 + i % 4] = static_cast<uint8_t>(run_codes[i] - 128);
      } else {
        const int64_t at = group * (w.depth / kCodeRun) + run;
        place_low(p.bits, run_codes, lane, codes + at * p.bits * 64);
        steps[at * kGroupRows + lane] = step;
      }
    }
  }
  for (int64_t column = 0; column < p.columns; ++column) {
    const bool in = p.group == Group::kIn;
    if (w.column_scales) const_cast<float*>(w.column_scales)[column] = scale_at(p, column / p.group_size);
    if (zeros) const_cast<int8_t*>(w.column_zeros)[column] = static_cast<int8_t>(in ? p.zeros[column / p.group_size] - middle : 1);
  }
}

bool quant_prepared_from(const Packed& packed, const QuantWeights& w) {
  const Header header = header_of(packed);
  return w.rows == header.rows && w.columns == header.columns && w.segment == header.segment && w.bits == header.bits &&
         !w.zeros == !header.has_zeros && !w.column_scales == !header.has_column_scales;
}

void quant_restore(const QuantWeights& w, const Packed& p) {
  uint8_t *codes = const_cast<uint8_t*>(p.codes), *scales = const_cast<uint8_t*>(p.scales);
  uint8_t *zeros = const_cast<uint8_t*>(p.zeros), *steps = const_cast<uint8_t*>(p.steps);
  const int64_t padded = w.panels * kPanelRows, middle = 1 << (p.bits - 1), runs = w.depth / kCodeRun;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t group = row / kGroupRows, lane = row % kGroupRows;
    for (int64_t run = 0; run * kCodeRun < p.columns; ++run) {
      uint8_t run_codes[kCodeRun];
      if (p.bits == 8) {
        const uint8_t* from = w.codes + (group * w.depth + run * kCodeRun) * kGroupRows;
        for (int64_t i = 0; i < kCodeRun; ++i) run_codes[i] = static_cast<uint8_t>(from[(i / 4 * kGroupRows + lane) * 4 + i % 4] + 128);
      } else {
        take_low(p.bits, w.codes + (group * runs + run) * p.bits * 64, lane, run_codes);
      }
      for (int64_t i = p.columns - run * kCodeRun; i < kCodeRun; ++i) run_codes[i] = 0;
      pack_run(p.bits, run_codes, codes + row * p.row_bytes() + run * 4 * p.bits);
    }
    if (!steps) continue;
    for (int64_t block = 0; block < p.groups(); ++block)
      steps[row * p.groups() + block] = w.steps[(group * runs + block * p.group_size / kCodeRun) * kGroupRows + lane];
  }
  for (int64_t i = 0; i < p.num_scales(); ++i) {
    const bool in = p.group == Group::kIn, by_block = p.group == Group::kBlock && !p.two_level();
    const int64_t first = in || p.group == Group::kOut ? i * p.group_size : i;  // of the group's columns or rows
    const int64_t at = by_block ? i % p.groups() * padded + i / p.groups() : first;
    std::memcpy(scales + i * 2, reinterpret_cast<const uint8_t*>((in ? w.column_scales : w.scales) + at) + 2, 2);
    if (zeros) zeros[i] = static_cast<uint8_t>((in ? w.column_zeros[at] : w.zeros[at]) + middle);
  }
}

const char* quant_weights(const uint8_t* prepared, int64_t size, QuantWeights& weights) {
  Header header;
  if (size < kPackedAlign) return "weight must come from quant_prepare";
  std::memcpy(&header, prepared, sizeof(header));
  if (header.magic != kMagic || header.version != kPreparedVersion) return "weight must come from quant_prepare";
  return lay_out(header, prepared, weights) == size ? nullptr : "weight has not the size that quant_prepare gave it";
}

}  // namespace kd::cpu
