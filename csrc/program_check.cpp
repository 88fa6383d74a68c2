// The checks of a program, once, when it is made. With those of every batch (program_check_batch.cpp) nothing in a step
// can read or write out of bounds. Each mistake is one line that names the operation and what does not fit.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <string>

#include "program.h"

namespace snello {

const char* op_name(int kind) {
  constexpr const char* kNames[] = {"embed",    "norm",    "transform", "linear",   "rope",  "attention",
                                    "activate", "add",     "gather",    "scale",    "route", "dispatch",
                                    "experts",  "combine", "adapt",     "convolve", "head",  "store"};
  return kind >= 0 && kind < static_cast<int>(std::size(kNames)) ? kNames[kind] : "unknown";
}

namespace {

constexpr int kMaxRows = 1 << 16, kMaxRotary = 512, kMaxColumns = 131072;

bool aligned(const void* data) { return data != nullptr && reinterpret_cast<uintptr_t>(data) % 64 == 0; }

class Checker {
 public:
  Checker(const ProgramSpec& spec, ProgramFacts* facts) : spec_(spec), facts_(facts) {
    facts_->sides.assign(spec.registers.size(), Side::kUnused);
    written_.resize(spec.registers.size());
    for (size_t r = 0; r < spec.registers.size(); ++r)
      written_[r].assign(size_t(width(int(r)) > 0 ? width(int(r)) : 0), false);
    layers_.assign(spec.cache ? spec.cache->layers.size() : 0, Layer::kFree);
  }

  bool check() {
    if (!check_limits() || !find(SNELLO_OP_GATHER, &facts_->gather) || !find(SNELLO_OP_HEAD, &facts_->head))
      return false;
    for (index_ = 0; index_ < static_cast<int>(spec_.ops.size()); ++index_) {
      op_ = &spec_.ops[static_cast<size_t>(index_)];
      if (!check_op()) return false;
    }
    const int output = spec_.ops.back().out;
    index_ = static_cast<int>(spec_.ops.size()) - 1;
    if (facts_->sides[static_cast<size_t>(output)] != Side::kOutputs) return bad("the last op must come after head");
    return is_float(output, "the output");
  }

 private:
  // ---- messages ----

  __attribute__((format(printf, 2, 3))) bool bad(const char* format, ...) const {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fail("op %d (%s): %s", index_, op_name(spec_.ops[static_cast<size_t>(index_)].kind), text);
    return false;
  }

  // ---- the whole ----

  bool check_limits() const {
    if (spec_.ops.empty()) return fail("a program needs operations"), false;
    if (spec_.max_rows < 1 || spec_.max_rows > kMaxRows)
      return fail("max_rows is %d: it must be 1 to %d", spec_.max_rows, kMaxRows), false;
    if (spec_.head_rows < 1 || spec_.head_rows > kMaxRows)
      return fail("head_rows is %d: it must be 1 to %d", spec_.head_rows, kMaxRows), false;
    for (size_t r = 0; r < spec_.registers.size(); ++r) {
      const snello_register& reg = spec_.registers[r];
      if (reg.width < 1 || reg.width > (1 << 24)) return fail("register %zu: width %d", r, reg.width), false;
      if (reg.rows < SNELLO_ROWS_F32 || reg.rows > SNELLO_ROWS_BF16)
        return fail("register %zu: rows of kind %d", r, reg.rows), false;
      if (reg.rows != SNELLO_ROWS_F32 && reg.width % kBlock != 0)
        return fail("register %zu: the width of a rounded register must be a multiple of %d, not %d", r, kBlock,
                    reg.width),
               false;
    }
    return true;
  }

  // The one operation of this kind.
  bool find(int kind, int* index) const {
    for (size_t i = 0; i < spec_.ops.size(); ++i) {
      if (spec_.ops[i].kind != kind) continue;
      if (*index >= 0) return fail("ops %d and %zu are both %s", *index, i, op_name(kind)), false;
      *index = static_cast<int>(i);
    }
    return *index >= 0 || (fail("the program has no %s", op_name(kind)), false);
  }

  // ---- registers ----

  int width(int reg) const { return spec_.registers[static_cast<size_t>(reg)].width; }
  int kind(int reg) const { return spec_.registers[static_cast<size_t>(reg)].rows; }
  bool quantized(int reg) const { return kind(reg) == SNELLO_ROWS_INT8; }

  bool exists(int reg, const char* what) const {
    if (reg >= 0 && reg < static_cast<int>(spec_.registers.size())) return true;
    return bad("%s is register %d of %zu", what, reg, spec_.registers.size());
  }
  bool is_float(int reg, const char* what) const {
    return kind(reg) == SNELLO_ROWS_F32 ||
           bad("%s (register %d) is %s", what, reg, quantized(reg) ? "quantized" : "BF16");
  }
  bool belongs(int reg, Side side) {
    Side& have = facts_->sides[static_cast<size_t>(reg)];
    if (have == Side::kUnused) have = side;
    if (have == side) return true;
    if (have == Side::kDispatched || side == Side::kDispatched)
      return bad("register %d would hold rows of the batch and rows of experts", reg);
    return bad("register %d is used on both sides of head", reg);
  }
  // Where this op's registers are; what works on dispatched rows as on others goes where its input is.
  Side side() const {
    if (index_ >= facts_->head) return Side::kOutputs;
    const bool either = op_->kind == SNELLO_OP_TRANSFORM || op_->kind == SNELLO_OP_ACTIVATE;
    const int in = op_->in[0];
    const bool known = either && in >= 0 && in < static_cast<int>(spec_.registers.size());
    return known && facts_->sides[static_cast<size_t>(in)] == Side::kDispatched ? Side::kDispatched : Side::kRows;
  }

  // A register that this op reads: it exists, lives on this side, and every column has been written.
  bool reads(int reg, const char* what) { return reads(reg, what, side()); }
  bool reads(int reg, const char* what, Side on) {
    if (!exists(reg, what) || !belongs(reg, on)) return false;
    const std::vector<bool>& columns = written_[static_cast<size_t>(reg)];
    for (size_t i = 0; i < columns.size(); ++i)
      if (!columns[i]) return bad("%s (register %d) is read before column %zu is written", what, reg, i);
    return true;
  }
  bool reads_float(int reg, const char* what) { return reads(reg, what) && is_float(reg, what); }
  bool writes(int reg, int begin, int end) { return writes(reg, begin, end, side()); }
  bool writes(int reg, int begin, int end, Side on) {
    if (!exists(reg, "out") || !belongs(reg, on)) return false;
    for (int i = begin; i < end; ++i) written_[static_cast<size_t>(reg)][static_cast<size_t>(i)] = true;
    if (reg == routed_.routes) routed_ = dispatched_ = {};  // whatever it is now, it is no list of experts
    return true;
  }
  bool writes_float(int reg) { return exists(reg, "out") && is_float(reg, "out") && writes(reg, 0, width(reg)); }
  // Float in0 and float out of one width; `apart`: they must differ.
  bool maps(bool apart) {
    if (!reads_float(op_->in[0], "in0") || !exists(op_->out, "out")) return false;
    if (apart && op_->in[0] == op_->out) return bad("in0 and out are both register %d", op_->out);
    if (width(op_->in[0]) != width(op_->out))
      return bad("in0 has %d columns, out has %d", width(op_->in[0]), width(op_->out));
    return writes_float(op_->out);
  }

  // ---- tensors ----

  const snello_tensor* tensor(int slot) const { return &spec_.tensors[static_cast<size_t>(op_->tensor[slot])]; }
  bool has(int slot) const { return op_->tensor[slot] >= 0; }
  bool tensor_exists(int slot) const {
    const int t = op_->tensor[slot];
    if (t < 0 || t >= static_cast<int>(spec_.tensors.size()))
      return bad("tensor[%d] is tensor %d of %zu", slot, t, spec_.tensors.size());
    if (!aligned(tensor(slot)->data)) return bad("the data of tensor %d is not 64-byte aligned", t);
    return true;
  }
  // A plain FP32 matrix; a vector has one row. Optional where -1 is allowed.
  bool plain(int slot, int rows, int columns, const char* what) const {
    return tensor_exists(slot) && plain_tensor(op_->tensor[slot], rows, columns, what);
  }
  bool plain_tensor(int id, int rows, int columns, const char* what) const {
    const snello_tensor& t = spec_.tensors[static_cast<size_t>(id)];
    if (!aligned(t.data)) return bad("the data of tensor %d is not 64-byte aligned", id);
    if (t.format != SNELLO_F32) return bad("%s (tensor %d) must be FP32", what, id);
    if (t.rows != rows || t.columns != columns)
      return bad("%s (tensor %d) is %d x %d: it must be %d x %d", what, id, t.rows, t.columns, rows, columns);
    const uint64_t bytes = uint64_t{4} * static_cast<uint64_t>(rows) * static_cast<uint64_t>(columns);
    if (t.bytes != bytes)
      return bad("%s (tensor %d) has %llu bytes: it must have %llu", what, id, static_cast<unsigned long long>(t.bytes),
                 static_cast<unsigned long long>(bytes));
    return true;
  }
  bool optional_vector(int slot, int columns, const char* what) const {
    return op_->tensor[slot] == -1 || plain(slot, 1, columns, what);
  }
  bool packed(int slot) const { return tensor_exists(slot) && packed_tensor(op_->tensor[slot]); }
  bool packed_tensor(int id) const {
    const snello_tensor& t = spec_.tensors[static_cast<size_t>(id)];
    if (!is_format(t.format)) return bad("tensor %d has format %d", id, t.format);
    if (t.rows < 1 || t.columns < 1 || t.columns > kMaxColumns)
      return bad("tensor %d is %d x %d", id, t.rows, t.columns);
    if (integer(t) && t.columns % kBlock != 0)
      return bad("tensor %d is an integer matrix of %d columns: it must be a multiple of %d", id, t.columns, kBlock);
    if (integers_of(t.format) > SNELLO_INT8 && t.group_size != 32 && t.group_size != 64 && t.group_size != 128)
      return bad("tensor %d has groups of %d columns: 32, 64 or 128", id, t.group_size);
    const uint64_t bytes = packed_bytes(t.format, t.rows, t.columns, t.group_size);
    if (t.bytes != bytes)
      return bad("tensor %d has %llu bytes: packed it must have %llu", id, static_cast<unsigned long long>(t.bytes),
                 static_cast<unsigned long long>(bytes));
    return true;
  }
  static bool integer(const snello_tensor& t) { return t.format >= SNELLO_INT8; }

  // ---- arguments ----

  bool one_of_flags(int i) const {
    return op_->i[i] == 0 || op_->i[i] == 1 || bad("i%d is %d: it must be 0 or 1", i, op_->i[i]);
  }
  bool rotates(int i, int columns) const {
    const int block = op_->i[i];
    if (block != 0 && block != 64 && block != 128)
      return bad("i%d is %d: a rotation takes blocks of 64 or 128", i, block);
    return block == 0 || columns % block == 0 || bad("blocks of %d do not divide %d columns", block, columns);
  }

  // ---- operations ----

  bool check_op() {
    switch (op_->kind) {
      case SNELLO_OP_EMBED: return check_embed();
      case SNELLO_OP_NORM: return check_norm();
      case SNELLO_OP_TRANSFORM: return check_transform();
      case SNELLO_OP_LINEAR: return check_linear();
      case SNELLO_OP_ROPE: return check_rope();
      case SNELLO_OP_ATTENTION: return check_attention();
      case SNELLO_OP_ACTIVATE: return check_activate();
      case SNELLO_OP_ADD: return check_add();
      case SNELLO_OP_GATHER: return check_gather();
      case SNELLO_OP_SCALE: return maps(false);
      case SNELLO_OP_ROUTE: return check_route();
      case SNELLO_OP_DISPATCH: return check_dispatch();
      case SNELLO_OP_EXPERTS: return check_experts();
      case SNELLO_OP_COMBINE: return check_combine();
      case SNELLO_OP_ADAPT: return check_adapt();
      case SNELLO_OP_CONVOLVE: return check_convolve();
      case SNELLO_OP_HEAD: return check_head();
      case SNELLO_OP_STORE: return check_store();
      default: return bad("kind %d", op_->kind);
    }
  }

  bool before_gather() const { return index_ < facts_->gather || bad("it must come before gather"); }
  bool before_head() const { return index_ < facts_->head || bad("it must come before head"); }

  bool check_embed() {
    if (!before_gather() || !packed(0) || !one_of_flags(2)) return false;
    if (op_->i[0] < 0 || op_->i[0] > 2) return bad("i0 is %d: 0 tokens, 1 positions, 2 token types", op_->i[0]);
    if (!exists(op_->out, "out")) return false;
    const snello_tensor& t = *tensor(0);
    if (by_channel(t.format))
      return bad("tensor %d is stored by channel: no row of it can be read alone", op_->tensor[0]);
    const int padding = t.columns - width(op_->out);
    if (padding < 0 || padding >= (integer(t) ? kBlock : 1))
      return bad("out has %d columns, tensor %d has %d", width(op_->out), op_->tensor[0], t.columns);
    if (!rotates(3, t.columns) || !optional_vector(1, t.columns, "the multiplier")) return false;
    if (op_->i[2] == 1 && !reads_float(op_->out, "out")) return false;
    if (op_->tensor[2] >= 0) {
      if (op_->i[0] != 0 || op_->i[2] != 0) return bad("only rows of tokens come from a second matrix, unadded");
      if (!packed(2)) return false;
      if (integer(*tensor(2)) || tensor(2)->columns != width(op_->out))
        return bad("tensor %d is no float matrix of %d columns", op_->tensor[2], width(op_->out));
    }
    return writes_float(op_->out);
  }

  bool check_norm() {
    if (!one_of_flags(0) || !maps(false)) return false;
    const int columns = width(op_->out), segment = op_->i[1] == 0 ? columns : op_->i[1];
    if (segment < 1 || columns % segment != 0) return bad("segments of %d do not divide %d columns", segment, columns);
    if (!(op_->f[0] >= 0.0f)) return bad("epsilon is %g", static_cast<double>(op_->f[0]));
    return optional_vector(0, segment, "the gain") && optional_vector(1, segment, "the bias");
  }

  bool check_transform() {
    if (!reads_float(op_->in[0], "in0") || !exists(op_->out, "out")) return false;
    if (op_->in[0] == op_->out) return bad("in0 and out are both register %d", op_->out);
    const int from = width(op_->in[0]), to = width(op_->out);
    if (to < from || to - from >= kBlock) return bad("in0 has %d columns, out has %d", from, to);
    if (!(op_->f[0] >= 0.0f) || std::isinf(op_->f[0])) return bad("the scale is %g", static_cast<double>(op_->f[0]));
    if (op_->f[0] > 0.0f && !quantized(op_->out)) return bad("a scale, but out (register %d) is float", op_->out);
    if (op_->tensor[1] != -1 && !quantized(op_->out))
      return bad("thresholds, but out (register %d) is float", op_->out);
    if (!one_of_flags(1) || !rotates(0, to) || !optional_vector(1, to, "the thresholds")) return false;
    if (op_->i[1] == 1 && side() != Side::kDispatched) return bad("i1 is 1, but in0 holds no rows of experts");
    const bool multipliers = op_->i[1] == 1 ? expert_vectors(from) : optional_vector(0, from, "the multiplier");
    return multipliers && writes(op_->out, 0, to);
  }

  // Whether in0's rows are of a kind and a width that the matrix takes.
  bool multiplies(int id) const {
    const int in = op_->in[0];
    const snello_tensor& t = spec_.tensors[static_cast<size_t>(id)];
    if (quantized(in) && !integer(t))
      return bad("in0 (register %d) is quantized, but tensor %d is a float matrix", in, id);
    const bool halves = kind(in) == SNELLO_ROWS_BF16;
    if (halves && t.format != SNELLO_BF16) return bad("in0 (register %d) is BF16, but tensor %d is not", in, id);
    const int columns = halves ? (t.columns + kBlock - 1) / kBlock * kBlock : t.columns;
    return width(in) == columns || bad("in0 has %d columns, tensor %d has %d", width(in), id, t.columns);
  }

  bool check_linear() {
    if (!reads(op_->in[0], "in0") || !packed(0) || !one_of_flags(0) || !exists(op_->out, "out")) return false;
    if (op_->in[0] == op_->out) return bad("in0 and out are both register %d", op_->out);
    const snello_tensor& t = *tensor(0);
    if (!multiplies(op_->tensor[0])) return false;
    if (by_channel(t.format) && !quantized(op_->in[0]))
      return bad("tensor %d is stored by channel, but in0 (register %d) is float", op_->tensor[0], op_->in[0]);
    const int begin = op_->i[1];
    if (begin < 0 || begin > width(op_->out) - t.rows)
      return bad("tensor %d has %d rows: they do not fit in out at column %d of %d", op_->tensor[0], t.rows, begin,
                 width(op_->out));
    if (!optional_vector(1, t.rows, "the bias") || !is_float(op_->out, "out")) return false;
    if (op_->i[0] == 1 && !reads(op_->out, "out")) return false;
    return writes(op_->out, begin, begin + t.rows);
  }

  bool check_rope() {
    if (!before_head() || !reads_float(op_->in[0], "in0") || !one_of_flags(3)) return false;
    if (op_->in[0] != op_->out) return bad("it works in place: in0 is %d, out is %d", op_->in[0], op_->out);
    const int heads = op_->i[0], head_dim = op_->i[1], rotary = op_->i[2];
    if (heads < 1 || head_dim < 1 || int64_t{heads} * head_dim != width(op_->out))
      return bad("%d heads of %d are not %d columns", heads, head_dim, width(op_->out));
    if (rotary < 2 || rotary % 2 != 0 || rotary > head_dim || rotary > kMaxRotary)
      return bad("%d rotary dims of %d", rotary, head_dim);
    if (!tensor_exists(0) || !tensor_exists(1)) return false;
    const int positions = tensor(0)->rows;
    if (positions < 1) return bad("the table has %d positions", positions);
    return plain(0, positions, rotary / 2, "the cosines") && plain(1, positions, rotary / 2, "the sines");
  }

  // Whether a layer of the cache was stored by this program, and attended to.
  enum class Layer : uint8_t { kFree, kStored, kUsed };

  // The cache layer i0 exists and is as far as it must be; then it is one further.
  bool takes_layer(Layer from, Layer to) {
    const int layer = op_->i[0];
    if (spec_.cache == nullptr) return bad("the program has no cache");
    if (layer < 0 || layer >= static_cast<int>(layers_.size()))
      return bad("cache layer %d of %zu", layer, layers_.size());
    Layer& have = layers_[static_cast<size_t>(layer)];
    if (have == Layer::kFree && from == Layer::kStored) return bad("nothing was stored in cache layer %d", layer);
    if (have != from) return bad("cache layer %d is another op's too", layer);
    have = to;
    return true;
  }
  const CacheLayer& layer() const { return spec_.cache->layers[static_cast<size_t>(op_->i[0])]; }

  bool check_convolve() {
    if (!before_gather() || !takes_layer(Layer::kFree, Layer::kUsed)) return false;
    const CacheLayer& have = layer();
    if (have.state_rows == 0) return bad("cache layer %d holds keys and values", op_->i[0]);
    if (op_->i[1] < 1 || op_->i[1] > have.state_rows)
      return bad("a kernel of %d over a state of %d rows", op_->i[1], have.state_rows);
    if (!exists(op_->out, "out")) return false;
    if (width(op_->out) != have.head_dim)
      return bad("out has %d columns, cache layer %d has rows of %d", width(op_->out), op_->i[0], have.head_dim);
    for (int i = 0; i < 3; ++i) {
      const char* names[] = {"in0", "in1", "in2"};
      if (!reads_float(op_->in[i], names[i])) return false;
      if (width(op_->in[i]) != have.head_dim)
        return bad("in%d has %d columns, not %d", i, width(op_->in[i]), have.head_dim);
      if (op_->in[i] == op_->out) return bad("in%d and out are both register %d", i, op_->out);
    }
    if (!plain(0, op_->i[1], have.head_dim, "the taps") || !optional_vector(1, have.head_dim, "the bias")) return false;
    return writes_float(op_->out);
  }

  bool check_store() {
    if (!before_gather() || !takes_layer(Layer::kFree, Layer::kStored)) return false;
    if (layer().state_rows != 0) return bad("cache layer %d holds the state of a convolution", op_->i[0]);
    if (op_->out != -1) return bad("out is register %d: it writes none", op_->out);
    const int columns = layer().num_kv_heads * layer().head_dim;
    for (int i = 0; i < 2; ++i) {
      if (!reads_float(op_->in[i], i == 0 ? "in0" : "in1")) return false;
      if (width(op_->in[i]) != columns) return bad("in%d has %d columns, not %d", i, width(op_->in[i]), columns);
    }
    return true;
  }

  bool check_attention() {
    const int heads = op_->i[1], kv_heads = op_->i[2], head_dim = op_->i[3];
    if (!before_head() || !one_of_flags(6) || !takes_layer(Layer::kStored, Layer::kUsed)) return false;
    const CacheLayer& have = layer();
    if (have.num_kv_heads != kv_heads || have.head_dim != head_dim)
      return bad("cache layer %d has %d kv heads of %d, not %d of %d", op_->i[0], have.num_kv_heads, have.head_dim,
                 kv_heads, head_dim);
    if (heads < 1 || heads % kv_heads != 0) return bad("%d heads over %d kv heads", heads, kv_heads);
    if (!reads_float(op_->in[0], "in0")) return false;
    const long long columns = static_cast<long long>(heads) * head_dim;
    if (width(op_->in[0]) != columns) return bad("in0 has %d columns, not %lld", width(op_->in[0]), columns);
    if (op_->in[0] == op_->out) return bad("in0 and out are both register %d", op_->out);
    if (!exists(op_->out, "out")) return false;
    if (width(op_->out) != columns) return bad("out has %d columns, not %lld", width(op_->out), columns);
    if (op_->i[4] < 0 || op_->i[5] < 0) return bad("a window of %d with %d sinks", op_->i[4], op_->i[5]);
    if (op_->i[5] > 0 && op_->i[4] == 0) return bad("sinks need a window");
    if (!(op_->f[0] > 0.0f)) return bad("the scale of scores is %g", static_cast<double>(op_->f[0]));
    if (!(op_->f[1] >= 0.0f)) return bad("the soft cap is %g", static_cast<double>(op_->f[1]));
    if (op_->i[7] < 0) return bad("%d rows", op_->i[7]);
    if (op_->i[7] > 0 && !reads_float(op_->out, "out")) return false;
    return writes_float(op_->out);
  }

  bool check_activate() {
    if (op_->i[0] < 0 || op_->i[0] > 5) return bad("i0 is %d: no such activation", op_->i[0]);
    if (op_->in[1] != -1) {
      if (!reads_float(op_->in[1], "in1") || !exists(op_->in[0], "in0")) return false;
      if (width(op_->in[1]) != width(op_->in[0]))
        return bad("in0 has %d columns, in1 has %d", width(op_->in[0]), width(op_->in[1]));
    }
    return maps(false);
  }

  bool check_add() {
    if (!reads_float(op_->in[1], "in1") || !exists(op_->out, "out")) return false;
    if (width(op_->in[1]) != width(op_->out))
      return bad("in1 has %d columns, out has %d", width(op_->in[1]), width(op_->out));
    return maps(false);
  }

  // ---- experts: route, dispatch, then experts, transform and activate as often as need be, and combine

  bool check_route() {
    if (!before_head() || !reads_float(op_->in[0], "in0") || !exists(op_->out, "out") || !one_of_flags(1)) return false;
    const int experts = width(op_->in[0]), active = op_->i[0];
    if (experts > kMaxExperts) return bad("%d experts: at most %d", experts, kMaxExperts);
    if (active < 1 || active > experts) return bad("%d of %d experts for each row", active, experts);
    if (op_->in[0] == op_->out) return bad("in0 and out are both register %d", op_->out);
    if (width(op_->out) != 2 * active) return bad("out has %d columns, not %d", width(op_->out), 2 * active);
    if (!writes_float(op_->out)) return false;
    routed_ = {op_->out, experts};
    dispatched_ = {};
    return true;
  }

  bool after_dispatch() const { return dispatched_.experts > 0 || bad("it has no dispatch before it"); }

  // The routes that were written last; nothing else is sure to hold numbers of experts.
  bool routes(int reg, const char* what) {
    if (!reads_float(reg, what)) return false;
    return reg == routed_.routes || bad("%s (register %d) is not what route wrote last", what, reg);
  }

  bool check_dispatch() {
    if (!before_head() || !reads(op_->in[0], "in0") || !routes(op_->in[1], "in1") || !exists(op_->out, "out"))
      return false;
    if (width(op_->in[0]) != width(op_->out) || kind(op_->in[0]) != kind(op_->out))
      return bad("in0 and out (registers %d and %d) are not alike", op_->in[0], op_->out);
    for (size_t r = 0; r < written_.size(); ++r)  // rows of an earlier dispatch are not these rows
      if (facts_->sides[r] == Side::kDispatched) written_[r].assign(written_[r].size(), false);
    dispatched_ = routed_;
    facts_->most_experts = std::max(facts_->most_experts, dispatched_.experts);
    facts_->most_active = std::max(facts_->most_active, width(dispatched_.routes) / 2);
    return writes(op_->out, 0, width(op_->out), Side::kDispatched);
  }

  bool experts_exist(int slot) const {
    const int64_t end = int64_t{op_->tensor[slot]} + dispatched_.experts;
    return end <= static_cast<int64_t>(spec_.tensors.size()) ||
           bad("tensor[%d] is the first of %d, and there are %zu tensors", slot, dispatched_.experts,
               spec_.tensors.size());
  }
  bool expert_vectors(int columns) const {
    if (!after_dispatch() || !tensor_exists(0) || !experts_exist(0)) return false;
    for (int e = 0; e < dispatched_.experts; ++e)
      if (!plain_tensor(op_->tensor[0] + e, 1, columns, "the multiplier")) return false;
    return true;
  }

  bool check_experts() {
    if (!before_head() || !after_dispatch() || !reads(op_->in[0], "in0", Side::kDispatched)) return false;
    if (!exists(op_->out, "out")) return false;
    if (!tensor_exists(0) || !experts_exist(0) || !is_float(op_->out, "out")) return false;
    if (op_->in[0] == op_->out) return bad("in0 and out are both register %d", op_->out);
    const snello_tensor& first = *tensor(0);
    for (int id = op_->tensor[0]; id < op_->tensor[0] + dispatched_.experts; ++id) {
      const snello_tensor& t = spec_.tensors[static_cast<size_t>(id)];
      if (!aligned(t.data)) return bad("the data of tensor %d is not 64-byte aligned", id);
      if (!packed_tensor(id)) return false;
      if (by_channel(t.format)) return bad("tensor %d is stored by channel: experts are not", id);
      if (t.rows != first.rows || t.columns != first.columns)
        return bad("tensor %d is %d x %d, the first expert's %d x %d", id, t.rows, t.columns, first.rows,
                   first.columns);
      if (!multiplies(id)) return false;
    }
    const int begin = op_->i[1];
    if (begin < 0 || begin > width(op_->out) - first.rows)
      return bad("tensor %d has %d rows: they do not fit in out at column %d of %d", op_->tensor[0], first.rows, begin,
                 width(op_->out));
    if (op_->i[0] != 0 || has(1)) return bad("it neither adds into out nor has a bias");
    return writes(op_->out, begin, begin + first.rows, Side::kDispatched);
  }

  bool check_combine() {
    if (!before_head() || !after_dispatch() || !reads(op_->in[0], "in0", Side::kDispatched)) return false;
    if (!is_float(op_->in[0], "in0")) return false;
    if (!routes(op_->in[1], "in1") || !exists(op_->out, "out") || !one_of_flags(0)) return false;
    if (op_->in[1] == op_->out) return bad("in1 and out are both register %d", op_->out);
    if (width(op_->in[0]) != width(op_->out))
      return bad("in0 has %d columns, out has %d", width(op_->in[0]), width(op_->out));
    if (op_->i[0] == 1 && !reads(op_->out, "out", Side::kRows)) return false;
    return writes_float(op_->out);
  }

  // What rows without an adapter, or columns that an adapter does not have, hold in a new out is nobody's affair.
  bool check_adapt() {
    if (!before_head() || !reads_float(op_->in[0], "in0") || !one_of_flags(0) || !exists(op_->out, "out")) return false;
    if (op_->in[0] == op_->out) return bad("in0 and out are both register %d", op_->out);
    const int first = op_->tensor[0], count = op_->i[2], begin = op_->i[1];
    if (count < 1 || (num_adapters_ > 0 && count != num_adapters_))
      return bad("%d adapters, and %d elsewhere", count, num_adapters_);
    num_adapters_ = count;
    if (first < 0 || int64_t{first} + count > static_cast<int64_t>(spec_.tensors.size()))
      return bad("tensor[0] is the first of %d, tensor %d of %zu", count, first, spec_.tensors.size());
    if (begin < 0 || begin > width(op_->out)) return bad("out has %d columns, not %d", width(op_->out), begin);
    for (int id = first; id < first + count; ++id)
      if (!adapter_matrix(id, width(op_->out) - begin)) return false;
    if (op_->i[0] == 1 && !reads(op_->out, "out")) return false;
    return is_float(op_->out, "out") && writes(op_->out, begin, width(op_->out));
  }
  bool adapter_matrix(int id, int most_rows) const {
    const snello_tensor& t = spec_.tensors[static_cast<size_t>(id)];
    if (t.rows == 0 && t.data == nullptr) return true;
    if (!aligned(t.data)) return bad("the data of tensor %d is not 64-byte aligned", id);
    if (!packed_tensor(id)) return false;
    if (integer(t)) return bad("tensor %d is an integer matrix", id);
    if (t.columns > width(op_->in[0]) || t.rows > most_rows)
      return bad("tensor %d is %d x %d: in0 has %d columns, and out %d", id, t.rows, t.columns, width(op_->in[0]),
                 most_rows);
    return true;
  }

  bool check_gather() {
    if (facts_->head < index_) return bad("it must come before head");
    if (op_->out != -1) return bad("out is register %d: it works in place", op_->out);
    const char* names[] = {"in0", "in1", "in2"};
    for (int i = 0; i < 3; ++i)
      if (op_->in[i] != -1 && !reads_float(op_->in[i], names[i])) return false;
    for (size_t r = 0; r < written_.size(); ++r)
      if (std::find(std::begin(op_->in), std::end(op_->in), static_cast<int>(r)) == std::end(op_->in))
        written_[r].assign(written_[r].size(), false);
    routed_ = dispatched_ = {};
    return true;
  }

  bool check_head() {
    if (!reads(op_->in[0], "in0", Side::kRows) || !is_float(op_->in[0], "in0") || !exists(op_->out, "out"))
      return false;
    if (width(op_->in[0]) != width(op_->out))
      return bad("in0 has %d columns, out has %d", width(op_->in[0]), width(op_->out));
    return writes_float(op_->out);
  }

  const ProgramSpec& spec_;
  ProgramFacts* facts_;
  std::vector<std::vector<bool>> written_;  // columns, per register
  std::vector<Layer> layers_;
  struct Routed {
    int routes = -1, experts = 0;
  };
  Routed routed_, dispatched_;
  int num_adapters_ = 0;
  const snello_op* op_ = nullptr;
  int index_ = 0;
};

}  // namespace

int check_program(const ProgramSpec& spec, ProgramFacts* facts) { return Checker(spec, facts).check() ? 0 : -1; }

}  // namespace snello
