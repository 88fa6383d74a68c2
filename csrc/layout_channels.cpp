// The same integers in another order: from panels to channels and back. Plain portable code, once per matrix.
#include <cstring>

#include "channels.h"
#include "kernels.h"

namespace snello {
namespace {

constexpr int64_t kLine = 64;
constexpr uint8_t kZeroPair = 0x88;  // two INT4 weights of 0

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One panel of 16 rows as layout.cpp writes it; Byte is uint8_t or const uint8_t.
template <class Byte>
struct PanelParts {
  Byte* base;
  int64_t scales, lines;
};
template <class Byte>
PanelParts<Byte> panel_parts(Byte* data, int format, int64_t columns, int group_size, int64_t panel) {
  const int64_t groups = format == SNELLO_INT4 ? (columns + group_size - 1) / group_size : 0;
  const int64_t lines = format == SNELLO_INT4 ? kLine + round_up(groups * kPanel, kLine) : 2 * kLine;
  const int64_t bytes = lines + columns * kPanel / (format == SNELLO_INT4 ? 2 : 1);
  return {data + panel * bytes, kLine, lines};
}

int64_t panel_byte(int format, int64_t k, int lane) {
  if (format == SNELLO_INT8) return k / 4 * kLine + lane * 4 + k % 4;
  return k / kBlock * 8 * kLine + k % (kBlock / 2) / 4 * kLine + lane * 4 + k % 4;
}
bool is_high_column(int format, int64_t k) { return format == SNELLO_INT4 && k % kBlock >= kBlock / 2; }

uint8_t take(uint8_t byte, int format, bool high) {
  if (format == SNELLO_INT8) return byte;
  return high ? byte >> 4 : byte & 15;
}
void put(uint8_t* byte, int format, bool high, uint8_t value) {
  if (format == SNELLO_INT8)
    *byte = value;
  else
    *byte = static_cast<uint8_t>(high ? (*byte & 0x0f) | value << 4 : (*byte & 0xf0) | value);
}

struct Shape {
  int format;  // SNELLO_INT8 or SNELLO_INT4
  int64_t rows, columns;
  int group_size;
  ChannelLayout layout;
};

// Moves one panel: to channels if `pack`, else back.
template <bool pack, class P, class C>
void move_panel(const Shape& s, P* panels, C* channels, int64_t panel) {
  const auto place = panel_parts(panels, s.format, s.columns, s.group_size, panel);
  const int64_t first = panel * kPanel, slab = first / s.layout.slab_rows;
  const ChannelBlock block = s.layout.block(slab / kBlockSlabs);
  C* base = channels + block.offset;
  const int64_t row = first - slab / kBlockSlabs * kBlockSlabs * s.layout.slab_rows;
  const int lanes = static_cast<int>(s.rows - first < kPanel ? s.rows - first : kPanel);
  if constexpr (pack)
    std::memcpy(base + 4 * row, place.base, 4 * static_cast<size_t>(lanes));
  else
    std::memcpy(place.base, base + 4 * row, 4 * static_cast<size_t>(lanes));
  for (int64_t g = 0; g < s.layout.groups; ++g) {
    P* here = place.base + place.scales + g * kPanel;
    C* there = base + block.scales + g * block.rows + row;
    if constexpr (pack)
      std::memcpy(there, here, static_cast<size_t>(lanes));
    else
      std::memcpy(here, there, static_cast<size_t>(lanes));
  }
  const int in_slab = static_cast<int>(first % s.layout.slab_rows);
  const bool high_row = in_slab >= kSlabBytes;
  C* line = base + block.lines + slab % kBlockSlabs * kSlabBytes;
  int32_t sums[kPanel] = {};
  for (int64_t k = 0; k < s.columns; ++k, line += block.stride) {
    for (int lane = 0; lane < lanes; ++lane) {
      P* here = place.base + place.lines + panel_byte(s.format, k, lane);
      C* there = line + channel_byte(in_slab + lane);
      if constexpr (pack) {
        put(there, s.format, high_row, take(*here, s.format, is_high_column(s.format, k)));
      } else {
        const uint8_t value = take(*there, s.format, high_row);
        put(here, s.format, is_high_column(s.format, k), value);
        sums[lane] += static_cast<int8_t>(value);
      }
    }
  }
  if constexpr (!pack)
    if (s.format == SNELLO_INT8) std::memcpy(place.base + kLine, sums, sizeof sums);
}

// Rows and columns that are only padding: q = 0, s = 1, r = 0.
void fill_panels(const Shape& s, uint8_t* data, uint64_t bytes) {
  std::memset(data, 0, bytes);
  if (s.format == SNELLO_INT8) return;
  for (int64_t p = 0; p < (s.rows + kPanel - 1) / kPanel; ++p) {
    const auto place = panel_parts(data, s.format, s.columns, s.group_size, p);
    std::memset(place.base + place.scales, 1, static_cast<size_t>(s.layout.groups * kPanel));
    std::memset(place.base + place.lines, kZeroPair, static_cast<size_t>(s.columns * kPanel / 2));
  }
}
void fill_channels(const Shape& s, uint8_t* data) {
  std::memset(data, 0, s.layout.bytes());
  if (s.format == SNELLO_INT8) return;
  for (int64_t b = 0; b * kBlockSlabs < s.layout.num_slabs; ++b) {
    const ChannelBlock block = s.layout.block(b);
    std::memset(data + block.offset + block.scales, 1, static_cast<size_t>(s.layout.groups * block.rows));
    std::memset(data + block.offset + block.lines, kZeroPair, static_cast<size_t>(s.columns * block.stride));
  }
}

int check_matrix(const snello_tensor* t, const void* packed, bool channels) {
  if (!t || !packed || !t->data) return fail("a matrix or its place is NULL");
  if (channels != by_channel(t->format) || t->format < SNELLO_INT8 || t->format == SNELLO_INT3)
    return fail("format %d is not an integer matrix stored by %s", t->format, channels ? "channel" : "panel");
  const uint64_t expected = packed_bytes(t->format, t->rows, t->columns, t->group_size);
  if (expected == 0) return -1;
  if (t->columns % kBlock != 0)
    return fail("the columns of an integer matrix are a multiple of 64, not %d", t->columns);
  if (t->bytes != expected)
    return fail("a packed matrix of this shape has %llu bytes, not %llu", static_cast<unsigned long long>(expected),
                static_cast<unsigned long long>(t->bytes));
  return 0;
}

Shape shape_of(const snello_tensor& t, int format) {
  return {integers_of(t.format), t.rows, t.columns, t.group_size,
          channel_layout(format, t.rows, t.columns, t.group_size)};
}

}  // namespace
}  // namespace snello

using namespace snello;

extern "C" {

int32_t snello_to_channels(const snello_tensor* matrix, void* packed) {
  if (check_matrix(matrix, packed, false) < 0) return -1;
  const int format = matrix->format == SNELLO_INT8 ? SNELLO_INT8_CHANNELS : SNELLO_INT4_CHANNELS;
  if (check_shape(format, matrix->rows, matrix->columns, matrix->group_size) < 0) return -1;
  const Shape shape = shape_of(*matrix, format);
  auto* to = static_cast<uint8_t*>(packed);
  fill_channels(shape, to);
  for (int64_t p = 0; p * kPanel < shape.rows; ++p)
    move_panel<true>(shape, static_cast<const uint8_t*>(matrix->data), to, p);
  return 0;
}

int32_t snello_from_channels(const snello_tensor* matrix, void* packed) {
  if (check_matrix(matrix, packed, true) < 0) return -1;
  const Shape shape = shape_of(*matrix, matrix->format);
  auto* to = static_cast<uint8_t*>(packed);
  fill_panels(shape, to, packed_bytes(shape.format, shape.rows, shape.columns, shape.group_size));
  for (int64_t p = 0; p * kPanel < shape.rows; ++p)
    move_panel<false>(shape, to, static_cast<const uint8_t*>(matrix->data), p);
  return 0;
}

}  // extern "C"
