"""Prediction of images from a config."""

from collections.abc import Sequence
from typing import Any, cast, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from numpy.typing import NDArray
from torch import nn

from psf.data import ClassNames, build_augmentations
from psf.finetuning import ClassCheckpointer
from psf.images import require_channel_order
from psf.inference import fast_preset, optimize_for_inference
from psf.modeling.build import model_dataset


def inference_checkpointer(cfg: CfgNode, model: nn.Module, save_dir: str = "") -> ClassCheckpointer:
    """A checkpointer that refuses weights of other classes than those of the model's data set."""
    names = [
        ClassNames.from_metadata(MetadataCatalog.get(dataset)) if dataset else None
        for dataset in (model_dataset(cfg), cfg.MODEL.PSF.WEIGHTS_DATASET)
    ]
    return ClassCheckpointer(
        model, save_dir, class_names=names[0], weights_class_names=names[1], same_classes=True
    )


class Predictor(DefaultPredictor):
    """
    Detectron2's ``DefaultPredictor`` for one image or a list of them.

    It also loads third-party checkpoints (``psf.weights``), and optimizes the model for inference
    (``psf.inference``).
    """

    def __init__(self, cfg: CfgNode, *, fast: bool = False, batch_size: int = 1) -> None:
        """
        Args:
            cfg: with ``MODEL.WEIGHTS``, and the data sets with the classes.
            fast: use bfloat16, two mask-decoder layers and compilation, whatever ``cfg`` says.
            batch_size: number of images of a list that are predicted together.

        Raises:
            ValueError: ``batch_size`` or a key of the config cannot be used, or the checkpoint has
                other classes than the data set.
        """
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
        require_channel_order(cfg.INPUT.FORMAT)
        self.cfg = fast_preset(cfg) if fast else cfg.clone()
        model = build_model(self.cfg).eval()
        self.metadata = MetadataCatalog.get(model_dataset(cfg))
        inference_checkpointer(cfg, model).load(cfg.MODEL.WEIGHTS)
        self.model = optimize_for_inference(model)
        self.batch_size = batch_size
        (self.aug,) = build_augmentations(cfg, is_train=False)
        self.input_format = cfg.INPUT.FORMAT

    @overload
    def __call__(self, images: NDArray[np.uint8]) -> dict[str, Any]: ...

    @overload
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]: ...

    @torch.inference_mode()
    def __call__(
        self, images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """
        Args:
            images: one image (H, W, 3) BGR of bytes, or a list of images of any sizes.

        Returns:
            The model's outputs at the size of the image; a list for a list.

        Raises:
            ValueError: an image has another type or shape. All are checked before the first is
                predicted.
        """
        if not isinstance(images, list | tuple):  # an image, or something that is refused
            return self([cast(Any, images)])[0]
        for i, image in enumerate(images):
            _check_image(image, i)
        outputs: list[dict[str, Any]] = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            outputs += self.model([self._input(image) for image in batch])
        return outputs

    def _input(self, image: NDArray[np.uint8]) -> dict[str, Any]:
        """Convert an image (H, W, 3) BGR to an input of the model."""
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        resized = self.aug.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}


def _check_image(image: Any, index: int) -> None:
    """Refuse what would be predicted wrongly or not at all."""
    if isinstance(image, np.ndarray):
        found = f"{image.dtype} of shape {image.shape}"
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size > 0:
            return
    else:
        found = f"a {type(image).__name__}"
    raise ValueError(
        f"Predictor: image {index} is {found}, not a NumPy array (H, W, 3) of uint8 with at least "
        "one pixel, in BGR. psf.data.read_image makes one of a file of any kind; multiply values "
        "in 0..1 by 255, and repeat a single channel three times."
    )
