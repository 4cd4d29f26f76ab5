"""Synthetic panoptic data: geometric things on textured stuff, generated on first use."""

from .dataset import generate_shapes, register_shapes, register_tuning_shapes
from .scene import CATEGORIES

__all__ = ["CATEGORIES", "generate_shapes", "register_shapes", "register_tuning_shapes"]
