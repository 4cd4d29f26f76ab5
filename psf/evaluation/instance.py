"""Average precision of the instance output (COCO)."""

import contextlib
import io
import logging
from typing import Any

import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances

from psf.data.annotations import (
    PARTS,
    find_instance_problems,
    normal_name,
    read_json,
    require_keys,
    require_none,
)
from psf.data.class_map import ClassNames

from .outputs import require_output

logger = logging.getLogger(__name__)


class InstanceEvaluator(COCOEvaluator):
    """
    Detectron2's AP evaluator, for any contiguous ids of the thing classes.

    The parent requires 0..K-1 in the order of the data set's ids, so the predicted classes are
    renumbered.
    """

    _coco_api: Any  # the parent's

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: registered with Detectron2, with an instances JSON (``json_file``).
            output_dir: folder for the predictions; None: not written.

        Raises:
            FileNotFoundError: the instances JSON does not exist.
            ValueError: there is none, a value of it cannot be used, or its images or thing classes
                are others.
        """
        metadata = MetadataCatalog.get(dataset_name)
        if metadata.get("json_file") is None:
            raise ValueError(
                f"Instance AP of '{dataset_name}' needs the annotations of its instances in "
                "COCO's format ('json_file' in the metadata). Register the data set with them, or "
                "set MODEL.PSF.TEST.INSTANCE_ON False."
            )
        content = read_json(metadata.json_file)
        require_keys(content, PARTS, metadata.json_file)
        require_none(find_instance_problems(content, scored=True), metadata.json_file)
        difference = _difference(content, metadata)
        if difference:
            raise ValueError(
                f"'{metadata.json_file}' {difference} of '{dataset_name}'. Panoptic and instances "
                "JSON must be of the same data set."
            )
        super().__init__(dataset_name, tasks=("bbox", "segm"), output_dir=output_dir)
        self._number_annotations()
        categories = self._coco_api.loadCats(sorted(self._coco_api.getCatIds()))
        rank = {category["id"]: i for i, category in enumerate(categories)}
        things: dict[int, int] = metadata.thing_dataset_id_to_contiguous_id
        self._rank = {contiguous: rank[dataset_id] for dataset_id, contiguous in things.items()}
        self._metadata = Metadata(
            name=dataset_name,
            json_file=metadata.json_file,
            thing_classes=[category["name"] for category in categories],
            thing_dataset_id_to_contiguous_id=rank,
        )

    def _number_annotations(self) -> None:
        """Give the annotations ids from 1, as COCO's evaluation takes 0 for "no match"."""
        annotations = self._coco_api.dataset["annotations"]
        ids = {annotation["id"] for annotation in annotations}
        if len(ids) == len(annotations) and min(ids, default=1) > 0:
            return
        logger.info("'%s': ids that are below 1 or repeated are replaced", self._metadata.json_file)
        for i, annotation in enumerate(annotations, start=1):
            annotation["id"] = i
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            self._coco_api.createIndex()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Store the predictions of a batch; neither argument is changed.

        Args:
            inputs: ``file_name`` and ``image_id`` of each image.
            outputs: ``instances`` of each image, classes by contiguous id.
        """
        require_output(inputs, outputs, "instances", "INSTANCE_ON")
        renumbered = [{"instances": self._renumber(output["instances"])} for output in outputs]
        super().process(inputs, renumbered)

    def _renumber(self, instances: Instances) -> Instances:
        renumbered = instances.to(self._cpu_device)
        classes = [self._rank[c] for c in renumbered.pred_classes.tolist()]
        renumbered.pred_classes = torch.tensor(classes, dtype=torch.int64)
        return renumbered


def _difference(content: dict[str, Any], metadata: Metadata) -> str | None:
    """What an instances JSON lacks of the data set that it belongs to; None: nothing."""
    listed = {image["id"] for image in content["images"]}
    records = DatasetCatalog.get(metadata.name)
    unlisted = [r["image_id"] for r in records if r["image_id"] not in listed]
    if unlisted:
        return f"lacks {len(unlisted)} images, such as {unlisted[0]!r},"
    things: dict[int, int] = metadata.thing_dataset_id_to_contiguous_id
    found = {category["id"]: category["name"] for category in content["categories"]}
    missing = sorted(things.keys() - found.keys())
    if missing:
        return f"lacks the thing categories with ids {missing}"
    names = ClassNames.from_metadata(metadata)
    by_contiguous_id = sorted(things, key=things.__getitem__)
    for dataset_id, name in zip(by_contiguous_id, names.things if names else (), strict=False):
        if normal_name(found[dataset_id]) != normal_name(name):
            return f"calls category {dataset_id} '{found[dataset_id]}' instead of '{name}'"
    return None
