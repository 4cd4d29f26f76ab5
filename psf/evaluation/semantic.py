"""Mean IoU of the semantic output, against label files or the panoptic ground truth.

Shapes: H x W pixels of the image.
"""

import logging
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from numpy.typing import DTypeLike, NDArray

from psf.images import read_values

from .ground_truth import load_ground_truth
from .outputs import require_output


class SemanticEvaluator(SemSegEvaluator):
    """
    Detectron2's mIoU evaluator, with label files or labels from the panoptic PNGs.

    If a record has ``sem_seg_file_name``, its labels are read (contiguous ids). Otherwise the label
    of a pixel is the class of its segment; void and crowds are ignored. So things and stuff
    must not share contiguous ids (as in Detectron2's "separated" data sets).
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: a panoptic data set registered with Detectron2.
            output_dir: folder for Detectron2's results; None: not written.

        Raises:
            ValueError: things and stuff share contiguous ids, or the ignored label is a class.
        """
        # The parent's constructor requires a label file in every record; set its attributes here.
        metadata = MetadataCatalog.get(dataset_name)
        self._logger = logging.getLogger(__name__)
        self._dataset_name = dataset_name
        self._distributed = True
        self._output_dir = output_dir
        self._cpu_device = torch.device("cpu")
        self._class_names = metadata.stuff_classes
        self._num_classes = len(metadata.stuff_classes)
        self._ignore_label = self._num_classes  # as the parent counts it, whatever files say
        self._ignored_in_files = metadata.ignore_label
        self._compute_boundary_iou = False
        self._contiguous_id_to_dataset_id = _dataset_ids(dataset_name)
        self._records = {r["file_name"]: r for r in DatasetCatalog.get(dataset_name)}
        has_label_files = any("sem_seg_file_name" in r for r in self._records.values())
        if has_label_files and 0 <= self._ignored_in_files < self._num_classes:
            raise ValueError(
                f"mIoU of '{dataset_name}': its label {self._ignored_in_files} is a class and "
                "means 'ignore' as well. Set ignore_label in its metadata to a value that is no "
                "class, or leave sem_seg_root out: labels are then those of the panoptic PNGs."
            )
        self.input_file_to_gt_file = {name: name for name in self._records}
        self.sem_seg_loading_fn = self._load_labels

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Count the pixels of a batch.

        Args:
            inputs: ``file_name`` of each image.
            outputs: ``sem_seg`` (classes, H, W) of each image, classes by contiguous id.
        """
        require_output(inputs, outputs, "sem_seg", "SEMANTIC_ON")
        super().process(inputs, outputs)

    def _load_labels(self, file_name: str, dtype: DTypeLike) -> NDArray[Any]:
        record = self._records[file_name]
        if "sem_seg_file_name" in record:
            labels = _read_labels(record["sem_seg_file_name"]).astype(dtype)
            is_ignored = labels == self._ignored_in_files
            wrong = labels[~is_ignored & ((labels < 0) | (labels >= self._num_classes))]
            if wrong.size:
                raise ValueError(
                    f"'{record['sem_seg_file_name']}' has the label {int(wrong[0])}, but labels "
                    f"are in 0..{self._num_classes - 1}, or {self._ignored_in_files} to be ignored."
                )
            labels[is_ignored] = self._ignore_label
            return labels
        return semantic_labels(record, self._ignore_label).astype(dtype)


def _read_labels(path: str) -> NDArray[np.integer]:
    labels = read_values(path)
    if labels.ndim != 2:
        raise ValueError(f"'{path}' is not a map of labels: it has {labels.shape[2]} channels.")
    return labels


def semantic_labels(dataset_dict: dict[str, Any], ignore_label: int) -> NDArray[np.int64]:
    """
    The class of every pixel: (H, W), contiguous ids, or ``ignore_label`` for void and crowds.
    """
    panoptic_seg, segments_info = load_ground_truth(dataset_dict)
    ids, index = np.unique(panoptic_seg.numpy(), return_inverse=True)
    classes = {s["id"]: s["category_id"] for s in segments_info if not s.get("iscrowd", 0)}
    labels = np.array([classes.get(i, ignore_label) for i in ids.tolist()], dtype=np.int64)
    return labels[index].reshape(panoptic_seg.shape)


def _dataset_ids(dataset_name: str) -> dict[int, int]:
    """The data set's category id of every contiguous id."""
    metadata = MetadataCatalog.get(dataset_name)
    things = metadata.thing_dataset_id_to_contiguous_id
    contiguous = {**metadata.stuff_dataset_id_to_contiguous_id, **things}
    inverse = {v: k for k, v in contiguous.items()}
    if len(inverse) < len(contiguous):
        raise ValueError(
            f"mIoU of '{dataset_name}': some things and stuff share a contiguous id, so that one "
            "label would mean two classes. Register the data set with one numbering for all."
        )
    return inverse
