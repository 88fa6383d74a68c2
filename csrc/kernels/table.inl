// All kernels of one instruction set. An isa/*.cpp includes this after its lanes, inside its own anonymous namespace.
#pragma once

#include "kernels/math.inl"
#include "kernels/transform.inl"
#include "kernels/linear.inl"
#include "kernels/rows.inl"
#include "kernels/experts.inl"
#include "kernels/attention.inl"
#include "kernels/convolve.inl"
#include "kernels/score.inl"
#include "kernels/noise.inl"

constexpr Kernels table(const char* name) {
  return {
      .name = name,
      .few_rows = 16,
      .few_panels = 1,
      .group_panels = kGroupPanels,
      .enough_rows = 128,
      .gates = false,
      .for_one_row = nullptr,
      .embed = embed,
      .norm = norm,
      .transform = transform,
      .rope = rope,
      .activate = activate,
      .add = add_rows,
      .scale = scale_rows,
      .route = route,
      .combine = combine,
      .convolve = convolve,
      .store_state = store_state,
      .linear = linear,
      .multiply = nullptr,
      .multiply_halves = nullptr,
      .multiplies_halves = nullptr,
      .store_kv = store_kv,
      .attend = attend,
      .softmax_stats = softmax_stats,
      .divergence = divergence,
      .by_temperature = by_temperature,
      .noise = noise,
      .read = read,
  };
}
