// Gated feed-forward layers (see program.h): two products of one input whose results meet in ACTIVATE. Where nobody
// else reads these, and the kernels can, they are one product that writes only what ACTIVATE makes of them. The bytes
// are the same either way.
#include <algorithm>
#include <iterator>
#include <utility>

#include "program.h"

using snello::LinearTask;
using snello::Part;
using snello::Stage;

// ---- making ----

// The two products of a stage, first the one that is `activate`'s first input.
std::pair<const snello_op&, const snello_op&> snello_program::gate_and_up(const Part& part, const Stage& stage,
                                                                          const snello_op& activate) const {
  const snello_op& first = op(part.actions[static_cast<size_t>(stage.begin)].op);
  const snello_op& second = op(part.actions[static_cast<size_t>(stage.begin) + 1].op);
  if (first.out == activate.in[0]) return {first, second};
  return {second, first};
}

// The ACTIVATE that begins `next` where the stage computes its two inputs and nobody else reads them; else -1.
int snello_program::gate_of(const Part& part, const Stage& stage, const Stage& next) const {
  if (stage.end - stage.begin != 2) return -1;
  const int number = part.actions[static_cast<size_t>(next.begin)].op;
  const snello_op& activate = op(number);
  const auto [gate, up] = gate_and_up(part, stage, activate);
  if (gate.kind != SNELLO_OP_LINEAR || up.kind != SNELLO_OP_LINEAR || activate.kind != SNELLO_OP_ACTIVATE) return -1;
  if (gate.out != activate.in[0] || up.out != activate.in[1] || gate.in[0] != up.in[0]) return -1;
  const snello_tensor &a = *tensor(gate.tensor[0]), &b = *tensor(up.tensor[0]);
  const bool alike = a.format == b.format && a.rows == b.rows && a.columns == b.columns && a.group_size == b.group_size;
  if (!alike || snello::by_channel(a.format) || a.rows != width(activate.out)) return -1;
  if (!quantized(gate.in[0])) return -1;
  for (const snello_op* o : {&gate, &up})
    if (o->i[0] == 1 || o->i[1] != 0 || o->tensor[1] >= 0) return -1;
  for (const int reg : {gate.out, up.out})
    if (reg != activate.out && !forgotten(reg, number)) return -1;
  return number;
}

// Whether nobody reads what a register holds after an operation: the next that mentions it writes all of it anew.
bool snello_program::forgotten(int reg, int after) const {
  for (int i = after + 1; i < static_cast<int>(spec_.ops.size()); ++i) {
    const snello_op& o = op(i);
    if (std::find(std::begin(o.in), std::end(o.in), reg) != std::end(o.in)) return false;
    if (o.out != reg) continue;
    return o.kind == SNELLO_OP_LINEAR && o.i[0] == 0 && o.i[1] == 0 && tensor(o.tensor[0])->rows == width(reg);
  }
  return reg != output_;
}

// ---- one step ----

bool snello_program::runs_gated(const Stage& stage) const { return stage.gate >= 0 && products_->gates; }

// Two products and what becomes of them.
LinearTask snello_program::gated_task(const Part& part, const Stage& stage, const Rows& r) const {
  const snello_op& activate = op(stage.gate);
  const auto [gate, up] = gate_and_up(part, stage, activate);
  LinearTask task = linear_task(gate, r);
  task.up = tensor(up.tensor[0]);
  task.activation = activate.i[0];
  task.output = rows(activate.out);
  return task;
}
