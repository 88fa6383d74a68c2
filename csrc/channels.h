// Where a matrix that is stored by channel keeps its parts (docs/numerics.md, Layout): shared by packing and kernels.
//
// A slab is what one line of 64 bytes holds of a channel: 128 rows of INT4, 64 of INT8. A block is up to 16 slabs, so
// that a channel is one run of up to 1 KiB, long enough for memory to deliver it at full speed and short enough for the
// sums of a block's rows to stay in L1.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace snello {

#define CHANNELS inline __attribute__((always_inline))

constexpr int kBlockSlabs = 16;
constexpr int kSlabBytes = 64;

struct ChannelBlock {
  int64_t offset;  // of the block
  int64_t rows;    // padded
  int64_t scales;  // offset of the group scales in it, [groups][rows] bytes; before them the row scales, [rows] FP32
  int64_t lines;   // offset of the weights in it, [columns][stride] bytes
  int64_t stride;  // bytes of a channel
};

struct ChannelLayout {
  int64_t slab_rows, num_slabs, groups, columns;

  CHANNELS int64_t bytes_of(int64_t slabs) const {
    return slabs * slab_rows * 4 + groups * slabs * slab_rows + columns * slabs * kSlabBytes;
  }
  CHANNELS uint64_t bytes() const { return static_cast<uint64_t>(bytes_of(num_slabs)); }
  CHANNELS ChannelBlock block(int64_t index) const {
    const int64_t left = num_slabs - index * kBlockSlabs, slabs = left < kBlockSlabs ? left : kBlockSlabs;
    const int64_t rows = slabs * slab_rows, scales = rows * 4;
    return {index * bytes_of(kBlockSlabs), rows, scales, scales + groups * rows, slabs * kSlabBytes};
  }
};

CHANNELS ChannelLayout channel_layout(int format, int64_t rows, int64_t columns, int group_size) {
  const int64_t slab_rows = format == SNELLO_INT4_CHANNELS ? 2 * kSlabBytes : kSlabBytes;
  const int64_t groups = format == SNELLO_INT4_CHANNELS ? (columns + group_size - 1) / group_size : 0;
  return {slab_rows, (rows + slab_rows - 1) / slab_rows, groups, columns};
}

// Row r of a slab is in byte channel_byte(r) of its line: four lines, interleaved byte by byte and then pair by pair,
// are four vectors of 16 rows x 4 channels in the order of rows. INT4: rows from 64 on are in the high nibbles.
CHANNELS int channel_byte(int row) { return row % 16 / 4 * 16 + row / 16 % 4 * 4 + row % 4; }

}  // namespace snello
