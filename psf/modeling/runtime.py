"""How the network runs at inference: precision, compilation, padding to fewer sizes.

Shapes: N images, L levels, C channels.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from psf.modeling.encoder import Shape

# Of the finest feature level, and of the coarsest that a config can have (NUM_FEATURE_LEVELS 4).
FINEST_STRIDE, COARSEST_STRIDE = 8, 64

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Runtime:
    """``MODEL.PSF.TEST.PRECISION``, ``COMPILE`` and ``PAD_TO``."""

    def __init__(self, *, precision: str, compile: bool, pad_to: int) -> None:
        """
        Args:
            precision: of matrix products and convolutions; float32 means no autocast.
            compile: compile the transformer with ``torch.compile``.
            pad_to: treat image sizes, in pixels, as the next multiple; 0: as they are.
        """
        if precision not in PRECISIONS:
            raise ValueError(
                f"MODEL.PSF.TEST.PRECISION is '{precision}'; known: {sorted(PRECISIONS)}"
            )
        if pad_to < 0 or pad_to % COARSEST_STRIDE:
            raise ValueError(
                f"MODEL.PSF.TEST.PAD_TO is {pad_to}; use a multiple of {COARSEST_STRIDE}, or 0"
            )
        self.precision = PRECISIONS[precision]
        self.compile = compile
        self.pad_to = pad_to
        self._compiled: Callable[..., Any] | None = None

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context of the network; for float32 it leaves the caller's autocast as it is."""
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.precision)

    def run(
        self,
        transformer: Callable[..., Any],
        feature_maps: Sequence[Tensor],
        valid_shapes: list[list[Shape]],
    ) -> Any:
        """
        Call ``transformer(feature_maps, valid_sizes, padded)``, padded and compiled as configured.

        Args:
            transformer: all its sizes come from tensors, so one program serves many sizes.
            feature_maps: L x (N, C, H_l, W_l) of strides 8, 16, ...
            valid_shapes: N x L x (h, w) of the part of each that is not padding.
        """
        feature_maps = pad_maps(feature_maps, self.pad_to)
        if not self.compile:
            return transformer(feature_maps, *valid_sizes(feature_maps, valid_shapes))
        if self._compiled is None:
            # A CUDA graph is recorded for every size, which pays where sizes are few.
            graphs = feature_maps[0].is_cuda and self.pad_to > 0
            mode = "reduce-overhead" if graphs else None
            self._compiled = torch.compile(transformer, fullgraph=True, mode=mode)
        return self._compiled(feature_maps, *valid_sizes(feature_maps, valid_shapes))


def valid_sizes(
    feature_maps: Sequence[Tensor], valid_shapes: list[list[Shape]]
) -> tuple[Tensor, bool]:
    """(N, L, 2) float32 of N x L x (h, w), and whether any map has padding."""
    shapes = [(m.shape[-2], m.shape[-1]) for m in feature_maps]
    sizes = torch.tensor(valid_shapes, dtype=torch.float32, device=feature_maps[0].device)
    return sizes.view(-1, len(shapes), 2), any(image != shapes for image in valid_shapes)


def pad_maps(feature_maps: Sequence[Tensor], pad_to: int) -> Sequence[Tensor]:
    """
    Pad feature maps as if they were of an image whose sides are multiples of ``pad_to``.

    Convolutions and normalisations have seen the image without this padding, and the transformer
    masks it, so predictions differ by rounding alone.

    Args:
        feature_maps: L x (N, C, H_l, W_l) of strides 8, 16, ...
        pad_to: pixels, a multiple of all strides; 0: no padding.
    """
    if pad_to == 0:
        return feature_maps
    height, width = (
        -(-side * FINEST_STRIDE // pad_to) * pad_to for side in feature_maps[0].shape[-2:]
    )
    padded = []
    for level, feature_map in enumerate(feature_maps):
        stride = FINEST_STRIDE * 2**level
        h, w = feature_map.shape[-2:]
        padded.append(F.pad(feature_map, (0, width // stride - w, 0, height // stride - h)))
    return padded
