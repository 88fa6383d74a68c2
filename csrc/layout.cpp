// Packed matrices: their size, packing and unpacking (docs/numerics.md, Layout).
//
// Packing happens once per checkpoint, so this is plain portable code; every value is checked on the way in, because a
// scale or a nibble out of range would silently break the promise that integer sums are exact.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "channels.h"
#include "kernels.h"

namespace snello {
namespace {
#include "lanes/scalar.h"

constexpr int64_t kLine = 64;
constexpr int kMaxIntegerColumns = 131072;  // int32 sums are exact up to here

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
bool is_grouped(int format) { return format == SNELLO_INT4 || format == SNELLO_INT3; }
bool is_integer(int format) { return format == SNELLO_INT8 || is_grouped(format); }
bool is_float(int format) { return format == SNELLO_F32 || format == SNELLO_F16 || format == SNELLO_BF16; }
bool is_group_size(int g) { return g == 32 || g == 64 || g == 128; }

int code_bits(int format) { return format == SNELLO_INT4 ? 4 : 3; }
int code_offset(int format) { return 1 << (code_bits(format) - 1); }  // the code of a weight of zero

// The parts of one panel, as offsets from its start.
struct PanelLayout {
  int64_t columns;  // padded
  int64_t groups;
  int64_t weights;
  int64_t bytes;
};

PanelLayout panel_layout(int format, int64_t columns, int group_size) {
  if (format == SNELLO_F32) return {columns, 0, 0, columns * kPanel * 4};
  if (!is_integer(format)) return {columns, 0, 0, round_up(columns * kPanel * 2, kLine)};
  const int64_t padded = round_up(columns, kBlock);
  if (format == SNELLO_INT8) return {padded, 0, 2 * kLine, 2 * kLine + padded * kPanel};
  const int64_t groups = (padded + group_size - 1) / group_size;
  const int64_t weights = kLine + round_up(groups * kPanel, kLine);
  return {padded, groups, weights, weights + padded * kPanel * code_bits(format) / 8};
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLine == 0; }

int check_packing(int format, int64_t rows, int64_t columns, int group_size, const void* packed) {
  if (check_shape(format, rows, columns, group_size) < 0) return -1;
  if (!packed || !is_aligned(packed)) return fail("a packed matrix must start at a multiple of 64 bytes");
  return 0;
}

int check_row_scales(const float* scale, int rows) {
  for (int n = 0; n < rows; ++n)
    if (!std::isfinite(scale[n])) return fail("the scale of row %d is not finite", n);
  return 0;
}

float read_float(int format, const void* source, int64_t i) {
  if (format == SNELLO_F32) return static_cast<const float*>(source)[i];
  const uint16_t half = static_cast<const uint16_t*>(source)[i];
  return format == SNELLO_F16 ? widen_f16(half) : widen_bf16(half);
}

void write_float(int format, void* target, int64_t i, float value) {
  if (format == SNELLO_F32) {
    static_cast<float*>(target)[i] = value;
  } else {
    static_cast<uint16_t*>(target)[i] = format == SNELLO_F16 ? narrow_f16(value) : narrow_bf16(value);
  }
}

// Same-format 16-bit values keep their bits, so even a NaN's payload survives packing.
void copy_float(int format, void* target, int64_t to, int source_format, const void* source, int64_t from) {
  const int64_t size = format == SNELLO_F32 ? 4 : 2;
  if (format == source_format) {
    std::memcpy(static_cast<uint8_t*>(target) + to * size, static_cast<const uint8_t*>(source) + from * size,
                static_cast<size_t>(size));
  } else {
    write_float(format, target, to, read_float(source_format, source, from));
  }
}

// Where column k of lane i is in a panel of floats, in values: BF16 has pairs of columns side by side.
int64_t float_place(int format, int64_t k, int lane) {
  if (format == SNELLO_BF16) return (k / 2 * kPanel + lane) * 2 + k % 2;
  return k * kPanel + lane;
}

// Where column k of lane i is among the lines of a panel: the byte, for INT4 whether it is the high nibble, for INT3
// the lowest bit of a code that has its bits together, else where its two low bits and its high bit are.
int64_t int8_byte(int64_t k, int lane) { return k / 4 * kLine + lane * 4 + k % 4; }
bool is_high(int64_t k) { return k % kBlock >= kBlock / 2; }
int64_t int4_byte(int64_t k, int lane) {
  const int64_t quad = k % (kBlock / 2) / 4;
  return k / kBlock * 8 * kLine + quad * kLine + lane * 4 + k % 4;
}

struct BitPlace {
  int64_t byte;
  int shift;
};
struct Int3Place {
  BitPlace low;   // of all three bits, or of the two low ones
  BitPlace high;  // of the high bit
};
Int3Place int3_place(int64_t k, int lane) {
  const int64_t start = k / kSumColumns * 3 * kLine + lane * 4 + k % 4;
  const int quad = static_cast<int>(k % kSumColumns / 4);
  if (quad < 6) {
    const BitPlace low = {start + quad / 2 * kLine, 3 * (quad % 2)};
    return {low, {low.byte, low.shift + 2}};
  }
  return {{start + (quad - 6) * kLine, 6}, {start + 2 * kLine, quad}};
}
int read_code(int format, const uint8_t* lines, int64_t k, int lane) {
  if (format == SNELLO_INT4) {
    const uint8_t byte = lines[int4_byte(k, lane)];
    return is_high(k) ? byte >> 4 : byte & 15;
  }
  const Int3Place place = int3_place(k, lane);
  return (lines[place.low.byte] >> place.low.shift & 3) | (lines[place.high.byte] >> place.high.shift & 1) << 2;
}
// Onto bits that are zero.
void add_code(int format, uint8_t* lines, int64_t k, int lane, int code) {
  if (format == SNELLO_INT4) {
    lines[int4_byte(k, lane)] |= static_cast<uint8_t>(is_high(k) ? code << 4 : code);
    return;
  }
  const Int3Place place = int3_place(k, lane);
  lines[place.low.byte] |= static_cast<uint8_t>((code & 3) << place.low.shift);
  lines[place.high.byte] |= static_cast<uint8_t>(code >> 2 << place.high.shift);
}

// The panel of a row and its lane in it.
template <class Byte>
struct Place {
  Byte* panel;
  int lane;
};
template <class Byte>
Place<Byte> place_of(Byte* packed, int64_t row, const PanelLayout& layout) {
  return {packed + row / kPanel * layout.bytes, static_cast<int>(row % kPanel)};
}

void write_line_value(uint8_t* line, int lane, const void* value) { std::memcpy(line + 4 * lane, value, 4); }

void unpack_float(const snello_tensor& t, const PanelLayout& layout, float* values) {
  for (int64_t n = 0; n < t.rows; ++n) {
    const auto place = place_of(static_cast<const uint8_t*>(t.data), n, layout);
    for (int64_t k = 0; k < t.columns; ++k)
      values[n * t.columns + k] = read_float(t.format, place.panel, float_place(t.format, k, place.lane));
  }
}

void unpack_int8_row(const snello_tensor& t, const PanelLayout& layout, int64_t n, float scale, float* values,
                     int8_t* q8) {
  const auto place = place_of(static_cast<const uint8_t*>(t.data), n, layout);
  for (int64_t k = 0; k < t.columns; ++k) {
    const auto q = static_cast<int8_t>(place.panel[layout.weights + int8_byte(k, place.lane)]);
    if (q8) q8[n * t.columns + k] = q;
    if (values) values[n * t.columns + k] = static_cast<float>(q) * scale;
  }
}

void unpack_grouped_row(const snello_tensor& t, const PanelLayout& layout, int64_t n, float scale, float* values,
                        uint8_t* codes, uint8_t* group_scale) {
  const auto place = place_of(static_cast<const uint8_t*>(t.data), n, layout);
  const int offset = code_offset(t.format);
  for (int64_t k = 0; k < t.columns; ++k) {
    const int q = read_code(t.format, place.panel + layout.weights, k, place.lane);
    const int64_t group = k / t.group_size;
    const auto s = static_cast<int8_t>(place.panel[kLine + group * kPanel + place.lane]);
    if (codes) codes[n * t.columns + k] = static_cast<uint8_t>(q);
    if (group_scale) group_scale[n * layout.groups + group] = static_cast<uint8_t>(s);
    if (values) values[n * t.columns + k] = static_cast<float>(s * (q - offset)) * scale;
  }
}

struct GroupedSource {
  const char* name;  // of the call, for errors
  int format;
  const uint8_t *codes, *group_scale;
  const float* row_scale;
  int rows, columns, group_size;
};

bool is_group_scale(int format, int s) { return s <= 15 && (format == SNELLO_INT4 ? s >= 1 : s >= -15 && s != 0); }

int pack_group_scales(const GroupedSource& source, int64_t n, Place<uint8_t> place) {
  const int64_t groups = (source.columns + source.group_size - 1) / source.group_size;
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t s = source.group_scale[n * groups + g];
    const int value = source.format == SNELLO_INT4 ? s : static_cast<int8_t>(s);
    if (!is_group_scale(source.format, value))
      return fail("%s: group_scale[%d, %d] is %d, not %s", source.name, static_cast<int>(n), static_cast<int>(g), value,
                  source.format == SNELLO_INT4 ? "1..15" : "-15..15 without 0");
    place.panel[kLine + g * kPanel + place.lane] = s;
  }
  return 0;
}

int pack_codes(const GroupedSource& source, int64_t n, Place<uint8_t> place, const PanelLayout& layout) {
  const int largest = (1 << code_bits(source.format)) - 1;
  uint8_t* lines = place.panel + layout.weights;
  for (int64_t k = 0; k < source.columns; ++k) {
    const int code = source.codes[n * source.columns + k];
    if (code > largest)
      return fail("%s: q[%d, %d] is %d, not 0..%d", source.name, static_cast<int>(n), static_cast<int>(k), code,
                  largest);
    add_code(source.format, lines, k, place.lane, code);
  }
  for (int64_t k = source.columns; k < layout.columns; ++k)
    add_code(source.format, lines, k, place.lane, code_offset(source.format));
  return 0;
}

int pack_grouped(const GroupedSource& source, void* packed) {
  if (check_packing(source.format, source.rows, source.columns, source.group_size, packed) < 0) return -1;
  if (!source.codes || !source.group_scale || !source.row_scale)
    return fail("%s: q, group_scale or row_scale is NULL", source.name);
  if (check_row_scales(source.row_scale, source.rows) < 0) return -1;
  const PanelLayout layout = panel_layout(source.format, source.columns, source.group_size);
  const int64_t rows = round_up(source.rows, kPanel);
  std::memset(packed, 0, static_cast<size_t>(rows / kPanel * layout.bytes));
  for (int64_t n = 0; n < rows; ++n) {
    const auto place = place_of(static_cast<uint8_t*>(packed), n, layout);
    for (int64_t g = 0; g < layout.groups; ++g) place.panel[kLine + g * kPanel + place.lane] = 1;
    if (n >= source.rows) {
      for (int64_t k = 0; k < layout.columns; ++k)
        add_code(source.format, place.panel + layout.weights, k, place.lane, code_offset(source.format));
      continue;
    }
    if (pack_group_scales(source, n, place) < 0 || pack_codes(source, n, place, layout) < 0) return -1;
    write_line_value(place.panel, place.lane, &source.row_scale[n]);
  }
  return 0;
}

int check_unpack(const snello_tensor& t, const int8_t* q8, const uint8_t* q4, const uint8_t* group_scale,
                 const float* row_scale) {
  if (by_channel(t.format)) return fail("a matrix stored by channel is unpacked by way of panels");
  if (check_packing(t.format, t.rows, t.columns, t.group_size, t.data) < 0) return -1;
  const uint64_t expected = packed_bytes(t.format, t.rows, t.columns, t.group_size);
  if (t.bytes != expected)
    return fail("a packed matrix of this shape has %llu bytes, not %llu", static_cast<unsigned long long>(expected),
                static_cast<unsigned long long>(t.bytes));
  if (is_integer(t.format) && t.columns % kBlock != 0)
    return fail("the columns of an integer matrix are a multiple of %d, not %d", kBlock, t.columns);
  if (q8 && t.format != SNELLO_INT8) return fail("only an INT8 matrix unpacks to q8");
  if ((q4 || group_scale) && !is_grouped(t.format))
    return fail("only an INT4 or INT3 matrix unpacks to q4 and group scales");
  if (row_scale && !is_integer(t.format)) return fail("only an integer matrix has row scales");
  return 0;
}

}  // namespace

int check_shape(int format, int64_t rows, int64_t columns, int group_size) {
  const int integers = integers_of(format);
  if (!is_float(format) && !is_integer(integers)) return fail("unknown format %d", format);
  if (rows < 1 || columns < 1)
    return fail("a matrix needs rows and columns, not %lld x %lld", static_cast<long long>(rows),
                static_cast<long long>(columns));
  if (is_integer(integers) && columns > kMaxIntegerColumns)
    return fail("an integer matrix has at most %d columns, not %lld", kMaxIntegerColumns,
                static_cast<long long>(columns));
  if (by_channel(format) && columns > kMaxChannels)
    return fail("a matrix stored by channel has at most %d columns, not %lld", kMaxChannels,
                static_cast<long long>(columns));
  if (is_grouped(integers) && !is_group_size(group_size))
    return fail("the group size must be 32, 64 or 128, not %d", group_size);
  if (!is_grouped(integers) && group_size != 0)
    return fail("only INT4 and INT3 have groups: group size %d", group_size);
  return 0;
}

uint64_t packed_bytes(int format, int64_t rows, int64_t columns, int group_size) {
  if (check_shape(format, rows, columns, group_size) < 0) return 0;
  if (by_channel(format)) return channel_layout(format, rows, round_up(columns, kBlock), group_size).bytes();
  const int64_t panels = (rows + kPanel - 1) / kPanel;
  return static_cast<uint64_t>(panels * panel_layout(format, columns, group_size).bytes);
}

}  // namespace snello

using namespace snello;

extern "C" {

uint64_t snello_packed_bytes(int32_t format, int32_t rows, int32_t columns, int32_t group_size) {
  return packed_bytes(format, rows, columns, group_size);
}

int32_t snello_pack_float(int32_t format, int32_t source_format, const void* source, int32_t rows, int32_t columns,
                          void* packed) {
  if (!is_float(format) || !is_float(source_format))
    return fail("pack_float takes F32, F16 and BF16, not formats %d and %d", source_format, format);
  if (check_packing(format, rows, columns, 0, packed) < 0) return -1;
  if (!source) return fail("pack_float: the source is NULL");
  const PanelLayout layout = panel_layout(format, columns, 0);
  std::memset(packed, 0, packed_bytes(format, rows, columns, 0));
  for (int64_t n = 0; n < rows; ++n) {
    const auto place = place_of(static_cast<uint8_t*>(packed), n, layout);
    for (int64_t k = 0; k < columns; ++k)
      copy_float(format, place.panel, float_place(format, k, place.lane), source_format, source, n * columns + k);
  }
  return 0;
}

int32_t snello_pack_int8(const int8_t* q, const float* row_scale, int32_t rows, int32_t columns, void* packed) {
  if (check_packing(SNELLO_INT8, rows, columns, 0, packed) < 0) return -1;
  if (!q || !row_scale) return fail("pack_int8: q or row_scale is NULL");
  if (check_row_scales(row_scale, rows) < 0) return -1;
  const PanelLayout layout = panel_layout(SNELLO_INT8, columns, 0);
  std::memset(packed, 0, packed_bytes(SNELLO_INT8, rows, columns, 0));
  for (int64_t n = 0; n < rows; ++n) {
    const auto place = place_of(static_cast<uint8_t*>(packed), n, layout);
    int32_t sum = 0;
    for (int64_t k = 0; k < columns; ++k) {
      const int8_t value = q[n * columns + k];
      if (value == INT8_MIN) return fail("pack_int8: q[%d, %d] is -128", static_cast<int>(n), static_cast<int>(k));
      sum += value;
      place.panel[layout.weights + int8_byte(k, place.lane)] = static_cast<uint8_t>(value);
    }
    write_line_value(place.panel, place.lane, &row_scale[n]);
    write_line_value(place.panel + kLine, place.lane, &sum);
  }
  return 0;
}

int32_t snello_pack_int4(const uint8_t* q, const uint8_t* group_scale, const float* row_scale, int32_t rows,
                         int32_t columns, int32_t group_size, void* packed) {
  return pack_grouped({"pack_int4", SNELLO_INT4, q, group_scale, row_scale, rows, columns, group_size}, packed);
}

int32_t snello_pack_int3(const uint8_t* q, const int8_t* group_scale, const float* row_scale, int32_t rows,
                         int32_t columns, int32_t group_size, void* packed) {
  const auto* scales = reinterpret_cast<const uint8_t*>(group_scale);
  return pack_grouped({"pack_int3", SNELLO_INT3, q, scales, row_scale, rows, columns, group_size}, packed);
}

int32_t snello_unpack(const snello_tensor* tensor, float* values, int8_t* q8, uint8_t* q4, uint8_t* group_scale,
                      float* row_scale) {
  if (!tensor) return fail("unpack: the tensor is NULL");
  const snello_tensor& t = *tensor;
  if (check_unpack(t, q8, q4, group_scale, row_scale) < 0) return -1;
  const PanelLayout layout = panel_layout(t.format, t.columns, t.group_size);
  if (is_float(t.format)) {
    if (values) unpack_float(t, layout, values);
    return 0;
  }
  for (int64_t n = 0; n < t.rows; ++n) {
    const auto place = place_of(static_cast<const uint8_t*>(t.data), n, layout);
    float scale;
    std::memcpy(&scale, place.panel + 4 * place.lane, sizeof scale);
    if (row_scale) row_scale[n] = scale;
    if (t.format == SNELLO_INT8) unpack_int8_row(t, layout, n, scale, values, q8);
    if (is_grouped(t.format)) unpack_grouped_row(t, layout, n, scale, values, q4, group_scale);
  }
  return 0;
}

}  // extern "C"
