// The packed format: one quantised weight [rows, columns] (out features, in features) as one run of bytes, the same for every device.
//
//   weight[n, k] = scale * (code - zero), or of a block below 8 bits: scale * (step * code - offset)
//
// A blob is a header of 64 bytes and sections, each at a multiple of 64 bytes and padded with zeros, in this order and without gaps.
// All numbers are little-endian.
//
//   header   0  char[4]   "KDQW"
//            4  uint16    version, 2
//            6  uint8     bits: 8, 4, 3 or 2
//            7  uint8     group: 0 channel, 1 out, 2 in, 3 block
//            8  uint8     1: symmetric, every zero is 2^(bits - 1)
//            9  uint8     bits of the activations that it is meant for: 8, or 0 for weight-only
//           10  uint16    0
//           12  uint32    CRC-32 (zlib's) of the blob with these four bytes as 0
//           16  int64     rows
//           24  int64     columns
//           32  int64     group_size: rows (out) or columns (in, block) of a group; 1 for channel
//           40  int64[3]  0
//   codes    per row, per 32 columns (the last 32 padded with code 0): 4 * bits bytes of unsigned codes c[0..31]
//            8 bits  byte i = c[i]
//            4 bits  byte i = c[i] | c[i + 16] << 4
//            2 bits  byte i = c[i] | c[i + 8] << 2 | c[i + 16] << 4 | c[i + 24] << 6
//            3 bits  the lower two bits of each code as for 2 bits, then 4 bytes: bit j of byte i = the upper bit of c[i + 4 * j]
//   scales   bfloat16: per row (channel, and block below 8 bits), per group of rows (out) or of columns (in), or per row and block
//            (block at 8 bits, row-major)
//   zeros    uint8 per scale; only where asymmetric, and not for block below 8 bits
//   steps    block below 8 bits: uint8 per row and block, row-major: step | z << (8 - bits), with step >= 1; else absent
//            offset = step * (z + 2^(bits - 1)) >> 1: a zero of 2^(bits - 2) + z / 2, in halves of a code
//
// Below 8 bits a block's scale is its row's, times an integer step, and step * code - offset lies within [-127, 127]: a product with
// 8-bit activations adds up in int32 over the whole row, with no float arithmetic inside. That costs a byte per block. Zeros in halves
// around the middle leave 11 % less squared error at 4 bits than whole ones over the whole range (all-MiniLM-L6, blocks of 32).
#pragma once
#include <cstdint>
#include <cstring>

namespace kd {

enum class Group : uint8_t { kChannel = 0, kOut = 1, kIn = 2, kBlock = 3 };

constexpr int64_t kPackedHeader = 64, kPackedAlign = 64;
constexpr int64_t kCodeRun = 32;                  // columns whose codes lie together
constexpr int64_t kMaxColumns = 32768;            // sums of 8-bit products, and every part of one, stay within int32
constexpr uint16_t kPackedVersion = 2;

inline int64_t packed_round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A blob, with pointers into it.
struct Packed {
  int64_t rows, columns, group_size;
  int bits, activation_bits;
  Group group;
  bool symmetric;
  const uint8_t* codes;
  const uint8_t* scales;  // bfloat16
  const uint8_t* zeros;   // null where absent, as steps
  const uint8_t* steps;

  int64_t row_bytes() const { return (columns + kCodeRun - 1) / kCodeRun * 4 * bits; }
  int64_t groups() const { return ((group == Group::kOut ? rows : columns) + group_size - 1) / group_size; }
  bool two_level() const { return group == Group::kBlock && bits < 8; }
  bool has_zeros() const { return !symmetric && !two_level(); }  // as a section: those of two levels are in `steps`
  int64_t num_scales() const {
    if (group == Group::kOut || group == Group::kIn) return groups();
    return two_level() || group == Group::kChannel ? rows : rows * groups();
  }
};

inline int code_at(const Packed& p, int64_t row, int64_t column) {
  const uint8_t* run = p.codes + row * p.row_bytes() + column / kCodeRun * 4 * p.bits;
  const int i = static_cast<int>(column % kCodeRun);
  if (p.bits == 8) return run[i];
  if (p.bits == 4) return run[i % 16] >> (i / 16 * 4) & 15;
  const int low = run[i % 8] >> (i / 8 * 2) & 3;
  return p.bits == 2 ? low : low | (run[8 + i % 4] >> (i / 4) & 1) << 2;
}

// A weight without its bytes, from its shape and its scheme in one number: bits | group << 4 | symmetric << 6 | group_size << 8.
// For hosts that can't read the memory where the weight lies. False if there is no such scheme.
inline bool packed_scheme(int64_t layout, int64_t rows, int64_t columns, Packed& p) {
  p = {};
  p.rows = rows;
  p.columns = columns;
  p.bits = static_cast<int>(layout & 15);
  p.group = static_cast<Group>(layout >> 4 & 3);
  p.symmetric = layout >> 6 & 1;
  p.group_size = layout >> 8;
  const bool known_bits = p.bits == 8 || p.bits == 4 || p.bits == 3 || p.bits == 2;
  return known_bits && p.group_size > 0 && (p.group != Group::kBlock || p.group_size % kCodeRun == 0);
}

// Which scale a weight has.
inline int64_t scale_index(const Packed& p, int64_t row, int64_t column) {
  switch (p.group) {
    case Group::kChannel: return row;
    case Group::kOut: return row / p.group_size;
    case Group::kIn: return column / p.group_size;
    case Group::kBlock: return p.two_level() ? row : row * p.groups() + column / p.group_size;
  }
  return 0;
}

inline float scale_at(const Packed& p, int64_t i) {
  float scale = 0;
  std::memcpy(reinterpret_cast<uint8_t*>(&scale) + 2, p.scales + i * 2, 2);  // bfloat16 is a float32's upper half
  return scale;
}

// The steps' byte of a row's run of 32 columns; without two levels, what takes the middle code off.
inline uint8_t step_of(const Packed& p, int64_t row, int64_t run) {
  if (p.two_level()) return p.steps[row * p.groups() + run * kCodeRun / p.group_size];
  return static_cast<uint8_t>(1 | 1 << 7);
}

// Points the sections of a weight, whose other fields are there, into its blob; returns the size that the blob must have.
inline int64_t packed_sections(const uint8_t* blob, Packed& p) {
  int64_t at = kPackedHeader;
  const auto section = [&](int64_t bytes) {
    const uint8_t* begin = blob + at;
    at += packed_round_up(bytes, kPackedAlign);
    return begin;
  };
  p.codes = section(p.rows * p.row_bytes());
  p.scales = section(p.num_scales() * 2);
  if (p.has_zeros()) p.zeros = section(p.num_scales());
  if (p.two_level()) p.steps = section(p.rows * p.groups());
  return at;
}

// Reads a header; returns what is wrong with it, or null.
inline const char* parse_packed_header(const uint8_t* blob, int64_t size, Packed& p) {
  if (size < kPackedHeader || std::memcmp(blob, "KDQW", 4) != 0) return "packed must be a packed weight: it does not begin with KDQW";
  uint16_t version;
  std::memcpy(&version, blob + 4, 2);
  if (version != kPackedVersion) return "packed is of a version that this build does not read";
  int64_t numbers[3];
  std::memcpy(numbers, blob + 16, sizeof(numbers));
  p = {};
  p.rows = numbers[0];
  p.columns = numbers[1];
  p.group_size = numbers[2];
  p.bits = blob[6];
  p.group = static_cast<Group>(blob[7]);
  p.symmetric = blob[8];
  p.activation_bits = blob[9];
  const bool known_bits = p.bits == 8 || p.bits == 4 || p.bits == 3 || p.bits == 2;
  if (!known_bits || blob[7] > 3 || blob[8] > 1 || (p.activation_bits != 0 && p.activation_bits != 8))
    return "packed has a scheme that this build does not know";
  constexpr int64_t kMaxRows = int64_t{1} << 40;
  if (p.rows < 1 || p.rows > kMaxRows || p.columns < 1 || p.columns > kMaxColumns || p.group_size < 1 || p.group_size > kMaxRows)
    return "packed has an impossible shape";
  if (p.group == Group::kBlock && p.group_size % kCodeRun != 0) return "packed has blocks that are no multiple of 32 columns";
  return nullptr;
}

// Reads a blob; returns what is wrong with it, or null. It protects memory; whether the bytes are the ones once written is the
// checksum's to say (kdkernels/quant/packed.py).
inline const char* parse_packed(const uint8_t* blob, int64_t size, Packed& p) {
  if (const char* wrong = parse_packed_header(blob, size, p)) return wrong;
  return packed_sections(blob, p) == size ? nullptr : "packed has not the size that its header says: it is truncated or damaged";
}

}  // namespace kd
