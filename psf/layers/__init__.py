"""Building blocks that know nothing about segmentation. They import torch only."""

from .ms_deform_attn import MSDeformAttn, ms_deform_attn, ms_deform_attn_reference

__all__ = ["MSDeformAttn", "ms_deform_attn", "ms_deform_attn_reference"]
