"""Panoptic SegFormer (arXiv 2109.03814) as a Detectron2 project.

Importing ``psf`` registers the meta-architecture, the backbones and the data sets with Detectron2.
Without Detectron2 only ``psf.layers`` and the core of ``psf.modeling`` (plain PyTorch) are usable.
"""

import warnings as _warnings
from importlib.util import find_spec

from . import threads as _threads  # noqa: F401  before torch is loaded

__version__ = "0.1.0"

if find_spec("detectron2") is not None:
    with _warnings.catch_warnings():
        # Of Detectron2's and fvcore's own code; nothing that a user could change.
        _warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", FutureWarning)
        from . import data as _data  # noqa: F401  registers the data sets
        from . import flops as _flops  # noqa: F401  registers the operator's
        from .config import add_psf_config, load_config
        from .modeling import backbone as _backbone  # noqa: F401  registers the backbones
        from .modeling import panoptic_segformer as _panoptic_segformer  # noqa: F401  registers it
        from .predictor import Predictor

    __all__ = ["Predictor", "add_psf_config", "load_config"]
