"""Evaluation with Detectron2's evaluators, for any numbering of things and stuff."""

from .build import build_evaluators
from .instance import InstanceEvaluator
from .panoptic import PanopticEvaluator
from .semantic import SemanticEvaluator

__all__ = ["InstanceEvaluator", "PanopticEvaluator", "SemanticEvaluator", "build_evaluators"]
