// torch.ops.psf.ms_deform_attn and its kin: their schemas. The kernels of each device are registered in
// its own file; autograd, autocast and the fake kernels are Python (ms_deform_attn.py).
//
// All of it is written against LibTorch's stable ABI, so that one binary serves every torch since 2.10.
#include "old_libraries.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(psf, m) {
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights, bool[3] output_mask, "
      "bool deterministic) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits) -> Tensor");
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
      "bool[4] output_mask, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_capability() -> str");
}
