"""Building blocks that know nothing about segmentation. They import torch only."""

from .deformable_detr import MSDeformAttnFunction
from .ms_deform_attn import (
    MSDeformAttn,
    ms_deform_attn,
    ms_deform_attn_fused,
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
)

__all__ = [
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "ms_deform_attn_fused_reference",
    "ms_deform_attn_reference",
]
