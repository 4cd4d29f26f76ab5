"""Denoising queries: noised ground truth that the location decoder learns to restore.

DN-DETR (arXiv 2203.01305): every thing gives queries with a little noise, to be restored, and, if
contrastive as in DINO (arXiv 2203.03605, section 3.3), as many with more noise, to be rejected.

Shapes: N images, G things of one image, D queries.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from psf.layers.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh


class NoisedThings(NamedTuple):
    """The denoising queries of a batch; images with fewer things than others are filled up."""

    labels: Tensor  # (N, D) int64 classes, some of them wrong
    boxes: Tensor  # (N, D, 4) cxcywh in [0, 1]
    target: Tensor  # (N, D) int64, the thing to restore; -1: none, the query is to be rejected
    valid: Tensor  # (N, D) bool, False where filled up
    num_groups: int  # D consists of so many groups, which do not see each other


class DenoisingOptions(NamedTuple):
    """How things become denoising queries."""

    num_groups: int  # times that every thing occurs
    label_noise: float  # probability of a random label
    box_noise: float  # most shift of an edge, in halves of the box's side; rejected: up to twice
    contrastive: bool  # with queries to be rejected


def noise_things(
    labels: Sequence[Tensor],
    boxes: Sequence[Tensor],
    num_classes: int,
    options: DenoisingOptions,
    generators: Sequence[torch.Generator],
) -> NoisedThings:
    """
    Args:
        labels: N x (G,) int64 in [0, num_classes).
        boxes: N x (G, 4) cxcywh in [0, 1].
        num_classes: thing classes.
        options: of the noise.
        generators: one per image, on the CPU: the noise of an image depends on no other image.

    Returns:
        D = ``num_groups`` * (the largest G) queries, or twice as many: in every group those to be
        restored, then those to be rejected.
    """
    device = boxes[0].device
    most = max(len(image) for image in labels)
    kinds = 2 if options.contrastive else 1
    shape = (len(labels), options.num_groups, kinds, most)
    all_labels = torch.zeros(shape, dtype=torch.int64, device=device)
    all_boxes = torch.full((*shape, 4), 0.5, device=device)
    target = torch.full(shape, -1, dtype=torch.int64, device=device)
    valid = torch.zeros(shape, dtype=torch.bool, device=device)
    for i, generator in enumerate(generators):
        count = len(labels[i])
        size = (options.num_groups, kinds, count)
        wrong = torch.rand(size, generator=generator) < options.label_noise
        random = torch.randint(max(1, num_classes), size, generator=generator)
        chosen = torch.where(wrong.to(device), random.to(device), labels[i])
        all_labels[i, ..., :count] = chosen
        shift = _shifts(size, generator).to(device) * options.box_noise
        all_boxes[i, ..., :count, :] = _shift_edges(boxes[i], shift)
        target[i, :, 0, :count] = torch.arange(count, device=device)
        valid[i, ..., :count] = True
    return NoisedThings(
        labels=all_labels.flatten(1),
        boxes=all_boxes.flatten(1, 3),
        target=target.flatten(1),
        valid=valid.flatten(1),
        num_groups=options.num_groups,
    )


def _shifts(size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """(groups, kinds, G, 4), either sign: up to 1 for queries to restore, 1 to 2 for the others."""
    amount = torch.rand((*size, 4), generator=generator)
    amount[:, 1:] += 1
    sign = torch.randint(2, (*size, 4), generator=generator) * 2 - 1
    return amount * sign


def _shift_edges(boxes: Tensor, shift: Tensor) -> Tensor:
    """Shift the edges of cxcywh boxes (G, 4) by (..., G, 4) halves of their sides."""
    half = boxes[:, 2:].repeat(1, 2) / 2
    edges = (cxcywh_to_xyxy(boxes) + shift * half).clamp(0, 1)
    low, high = edges.split(2, dim=-1)  # edges that changed places are put back
    return xyxy_to_cxcywh(torch.cat([torch.minimum(low, high), torch.maximum(low, high)], dim=-1))
