// Few rows of quantized activations times a matrix that is stored by channel: channels whose inputs are all 0 are not
// read.
//
// The others, in ascending order, are taken four at a time. Their lines are interleaved into the same quads that a
// panel holds, so the products are those of linear.inl and, being exact, have the same bits. Memory is read channel by
// channel, in runs; the sums of a block's rows wait in L1. What comes next is known, so it is fetched ahead: the
// hardware, which only sees gaps, cannot.
#pragma once

constexpr int kDirectRowsChannels = 4;
constexpr int kChannelsAhead = 8;  // at least so many channels are fetched ahead, and so many bytes
constexpr int kChannelBytesAhead = 8192;

// The channels with an input that is not 0, padded per group to a multiple of four with inputs that are 0.
struct ActiveChannels {
  int count, num_groups;
  int end[kMaxChannels / kSumColumns];
  int32_t sums[kDirectRowsChannels][kMaxChannels / kSumColumns];  // of a group's inputs
  int32_t channel[kMaxChannels + kPanel];                         // whole vectors are stored, also at the end
  alignas(64) int8_t q[kDirectRowsChannels][kMaxChannels + kPanel];
};

alignas(64) constexpr int32_t kAscending[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <int rows>
inline void find_active(const LinearTask& task, int group, ActiveChannels& active) {
  const QuantRows& x = task.quant;
  int n = 0, g = 0;
  for (int k = 0; k < x.width; k += group, ++g) {
    const int end = k + group < x.width ? k + group : x.width;
    for (int r = 0; r < rows; ++r) active.sums[r][g] = 0;
    for (int at = k; at < end; at += kLanes) {
      Mask zero = equal(load_s8(x.row(0) + at), set1(0));
      for (int r = 1; r < rows; ++r) zero = mask_and(zero, equal(load_s8(x.row(r) + at), set1(0)));
      const Mask some = mask_not(zero);
      store(active.channel + n, compress(add(load(kAscending), set1(at)), some));
      for (int r = 0; r < rows; ++r) store_s8(active.q[r] + n, compress(load_s8(x.row(r) + at), some));
      n += __builtin_popcount(bits(some));
    }
    for (int r = 0; r < rows; ++r)
      for (int s = k / kSumColumns; s < end / kSumColumns; ++s) active.sums[r][g] += x.row_sums(r)[s];
    for (; n % 4; ++n) {
      active.channel[n] = active.channel[n - 1];
      for (int r = 0; r < rows; ++r) active.q[r][n] = 0;
    }
    active.end[g] = n;
  }
  active.count = n;
  active.num_groups = g;
}

// Some slabs of a block: `panels` panels each, with sums [slab][row][panel].
template <int rows, int panels>
class ChannelSlabs {
 public:
  static constexpr int kMost = kBlockSlabs / rows;

  ChannelSlabs(const LinearTask& task, const ActiveChannels& active, const ChannelBlock& block, int first, int count)
      : task_(task), active_(active), block_(block), first_(first), count_(count) {
    base_ = static_cast<const uint8_t*>(task.weights->data) + block.offset;
    lines_ = base_ + block.lines + static_cast<int64_t>(first) * kSlabBytes;
    const int run = count * kSlabBytes, wanted = kChannelBytesAhead / run / 4 * 4;
    ahead_ = wanted > kChannelsAhead ? wanted : kChannelsAhead;
  }

  // `panel`: the first one of these slabs.
  void run(int panel) {
    if constexpr (panels == 8)
      multiply_by_group();
    else
      multiply_all();
    for (int s = 0; s < count_; ++s)
      for (int t = 0; t < panels; ++t) finish(panel + s * panels + t, s, t);
  }

 private:
  int32_t* sum(int32_t* of, int s, int r, int t) const { return of + ((s * rows + r) * panels + t) * kPanel; }

  // INT8: all channels add up.
  void multiply_all() {
    start(total_, 0);
    multiply(total_, 0, active_.count);
    for (int s = 0; s < count_; ++s)
      for (int r = 0; r < rows; ++r)
        for (int t = 0; t < panels; ++t) {
          int32_t* total = sum(total_, s, r, t);
          store(total, sub(load(total), set1(weight_bias(task_, r))));
        }
  }
  // INT4: each group of channels meets its scale.
  void multiply_by_group() {
    for (int s = 0; s < count_; ++s)
      for (int r = 0; r < rows; ++r)
        for (int t = 0; t < panels; ++t) store(sum(total_, s, r, t), set1(0));
    for (int g = 0, begin = 0; g < active_.num_groups; begin = active_.end[g++]) {
      if (begin == active_.end[g]) continue;
      start(part_, g);
      multiply(part_, begin, active_.end[g]);
      scale(g);
    }
  }
  void start(int32_t* sums, int g) const {
    for (int r = 0; r < rows; ++r) {
      const I32 value = set1(panels == 8 ? -8 * active_.sums[r][g] : 0);
      for (int s = 0; s < count_; ++s)
        for (int t = 0; t < panels; ++t) store(sum(sums, s, r, t), value);
    }
  }
  void scale(int g) {
    const uint8_t* scales = base_ + block_.scales + g * block_.rows + static_cast<int64_t>(first_) * panels * kPanel;
    for (int s = 0; s < count_; ++s)
      for (int t = 0; t < panels; ++t, scales += kPanel) {
        const I32 factor = load_u8(scales);
        for (int r = 0; r < rows; ++r) {
          int32_t* total = sum(total_, s, r, t);
          store(total, add(load(total), mul(load(sum(part_, s, r, t)), factor)));
        }
      }
  }

  const uint8_t* line(int i) const { return lines_ + active_.channel[i] * block_.stride; }

  void multiply(int32_t* sums, int begin, int end) const {
    for (int i = begin; i < end; i += 4) {
      const int next = i + ahead_ + 4 <= active_.count ? i + ahead_ : active_.count - 4;
      const uint8_t *at[4], *coming[4];
      for (int c = 0; c < 4; ++c) at[c] = line(i + c);
      for (int c = 0; c < 4; ++c) coming[c] = line(next + c);
      Quads x[rows];
      for (int r = 0; r < rows; ++r) x[r] = set1_quad(active_.q[r] + i);
      for (int s = 0; s < count_; ++s) {
        const int64_t offset = static_cast<int64_t>(s) * kSlabBytes;
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) __builtin_prefetch(coming[c] + offset, 0, 3);
        multiply_slab(sum(sums, s, 0, 0), interleave(at[0] + offset, at[1] + offset, at[2] + offset, at[3] + offset),
                      x);
      }
    }
  }
  LANES static void multiply_slab(int32_t* sums, const Interleaved& lines, const Quads (&x)[rows]) {
#pragma GCC unroll 8
    for (int t = 0; t < panels; ++t) {
      const Quads w = panels == 4 ? as_weights(lines.v[t])
                      : t < 4     ? nibbles<0>(lines.v[t % 4])
                                  : nibbles<1>(lines.v[t % 4]);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        int32_t* sum = sums + (r * panels + t) * kPanel;
        store(sum, panels == 4 ? dot_weights(load(sum), w, x[r]) : dot_us(load(sum), w, x[r]));
      }
    }
  }

  void finish(int p, int s, int t) {
    if (p * kPanel >= task_.weights->rows) return;  // padding
    const Panel panel = panel_at(*task_.weights, p);
    for (int r = 0; r < rows; ++r) finish_integer(task_, r, p, panel, load(sum(total_, s, r, t)));
  }

  const LinearTask& task_;
  const ActiveChannels& active_;
  const ChannelBlock& block_;
  const uint8_t *base_, *lines_;
  int first_, count_, ahead_;
  alignas(64) int32_t total_[kMost * rows * panels * kPanel];
  alignas(64) int32_t part_[panels == 8 ? kMost * rows * panels * kPanel : kPanel];
};

template <int rows, int panels>
inline void direct_channels(const LinearTask& task, const ActiveChannels& active, int64_t slab0, int64_t slab1) {
  const ChannelLayout layout = channel_layout_of(*task.weights);
  for (int64_t slab = slab0; slab < slab1;) {
    const int64_t index = slab / kBlockSlabs, block_end = (index + 1) * kBlockSlabs;
    const ChannelBlock block = layout.block(index);
    const int64_t end = block_end < slab1 ? block_end : slab1;
    for (int64_t count; slab < end; slab += count) {
      count = tile_rows(static_cast<int>(end - slab), ChannelSlabs<rows, panels>::kMost);
      ChannelSlabs<rows, panels> slabs(task, active, block, static_cast<int>(slab % kBlockSlabs),
                                       static_cast<int>(count));
      slabs.run(static_cast<int>(slab) * panels);
    }
  }
}

// Panels [p0, p1), whole slabs but at the matrix's end.
struct DirectChannels {
  const LinearTask& task;
  int p0, p1;
  template <int rows>
  void run() const {
    ActiveChannels active;
    const bool int4 = task.weights->format == SNELLO_INT4_CHANNELS;
    find_active<rows>(task, int4 ? task.weights->group_size : task.quant.width, active);
    const int panels = int4 ? 8 : 4;
    const int64_t slab0 = p0 / panels, slab1 = (p1 + panels - 1) / panels;
    if (int4) return direct_channels<rows, 8>(task, active, slab0, slab1);
    direct_channels<rows, 4>(task, active, slab0, slab1);
  }
};
