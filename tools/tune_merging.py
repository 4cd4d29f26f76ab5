#!/usr/bin/env python3
"""Find the merging parameters with the best PQ on images that no result is reported of.

python tools/tune_merging.py --config-file output/shapes/config.yaml \\
    --dataset shapes_panoptic_tune MODEL.WEIGHTS output/shapes/model_final.pth

Predicts each image once, then tries score thresholds, mask exponents and keep fractions on what was
predicted. Prints PQ with the config's values and with the best ones, and these as KEY VALUE pairs.
The exponent of the class probability stays: with both exponents k times as large and the threshold
to the power of k, all decisions are the same.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psf.threads  # isort: skip  # noqa: F401  before torch is loaded

import numpy as np
import torch
import tqdm
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger

from psf.config import load_config
from psf.data import PanopticDatasetMapper, register_listed
from psf.data.coco_panoptic import find_files
from psf.evaluation.ground_truth import PanopticAnnotations, read_annotations
from psf.evaluation.panoptic_quality import ImageRecord, add_up, compare, quality_rows
from psf.evaluation.renumbering import Renumbering
from psf.files import one_line
from psf.inference import optimize_for_inference
from psf.modeling.build import model_dataset
from psf.modeling.candidates import Candidates
from psf.modeling.postprocessing import MergingRules
from psf.panoptic_png import read_panoptic_ids
from psf.predictor import inference_checkpointer
from psf.trainer import Trainer
from psf.weights import check_weights

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 15))
# Values of the other parameters; mask exponents are in units of the class exponent.
GRIDS = {
    "mask_exponent": (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
    "thing_keep_fraction": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "stuff_keep_fraction": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
}
KEYS = {field: f"MODEL.PSF.TEST.{field.upper()}" for field in ("score_threshold", *GRIDS)}


class Quality(NamedTuple):
    """PQ over all classes, things and stuff, in percent."""

    pq: float
    pq_th: float
    pq_st: float

    def __str__(self) -> str:
        return f"PQ {self.pq:.2f} PQ_th {self.pq_th:.2f} PQ_st {self.pq_st:.2f}"


@one_line()
def main(argv: Sequence[str] | None = None) -> None:
    tune(parse(argv))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--dataset", required=True, help="a registered data set; not a test set")
    parser.add_argument(
        "--images", type=int, default=500, help="most images, evenly spaced (%(default)s)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser.parse_args(argv)


def tune(args: argparse.Namespace) -> None:
    """Predict, search and print."""
    cfg = load_config(args.config_file, args.opts)
    records = images_of(cfg, args.dataset, args.images)
    setup_logger(name="psf")
    model = load_model(cfg)
    rules = model.inference_options.rules
    thresholds = sorted({*THRESHOLDS, rules.score_threshold})
    unit = rules.class_exponent or 1.0
    grids = {**GRIDS, "mask_exponent": tuple(unit * value for value in GRIDS["mask_exponent"])}
    loosest = rules._replace(
        score_threshold=min(thresholds),
        mask_exponent=min(rules.mask_exponent, *grids["mask_exponent"]),
    )
    with tempfile.TemporaryDirectory(prefix="tune_merging-") as folder:
        files = list(store_predictions(cfg, model, records, loosest, Path(folder)))
        predictions = Predictions(cfg, model, args.dataset, records, files)
        print(f"{len(records)} images of {args.dataset}; with the config's values:")
        before = predictions.measure(rules, [rules.score_threshold])[rules.score_threshold]
        print(before)
        if before.pq != before.pq:  # NaN
            raise ValueError(f"No image of '{args.dataset}' has a segment to measure PQ with")
        best, after = search(lambda r: predictions.measure(r, thresholds), rules, grids)
    print("with the best values:")
    print(after)
    # As floats: yacs refuses a 1 for a 1.0.
    print(" ".join(f"{key} {float(getattr(best, field))}" for field, key in KEYS.items()))


def images_of(cfg: CfgNode, name: str, most: int) -> list[dict[str, Any]]:
    """
    Images with annotations, evenly spaced over a data set.

    Raises:
        ValueError: results are reported of the data set, there is none of that name, or it has no
            annotations.
    """
    check_weights(cfg.MODEL.WEIGHTS)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("There are no weights: add MODEL.WEIGHTS and a path")
    if name in cfg.DATASETS.TEST:
        raise ValueError(
            f"'{name}' is in DATASETS.TEST: parameters that are chosen on the images that results "
            "are reported of make the results too good. Choose them on other images"
        )
    register_listed(cfg.DATASETS.REGISTER)
    find_files(name)  # or an error: there is none
    records = [r for r in DatasetCatalog.get(name) if r.get("pan_seg_file_name")]
    if not records or most < 1:
        raise ValueError(f"There are no images with annotations to tune on ('{name}')")
    number = min(most, len(records))
    return [records[i * len(records) // number] for i in range(number)]


def load_model(cfg: CfgNode) -> Any:
    """The model of a config with its weights, for inference."""
    cfg = cfg.clone()
    cfg.MODEL.PSF.TEST.PANOPTIC_ON = True
    cfg.MODEL.PSF.TEST.INSTANCE_ON = cfg.MODEL.PSF.TEST.SEMANTIC_ON = False
    model: Any = Trainer.build_model(cfg).eval()
    inference_checkpointer(cfg, model).load(cfg.MODEL.WEIGHTS)
    return optimize_for_inference(model)


@torch.no_grad()
def store_predictions(
    cfg: CfgNode,
    model: Any,
    records: Sequence[dict[str, Any]],
    loosest: MergingRules,
    folder: Path,
) -> Iterator[Path]:
    """Predict images; yields a file of each, with what is merged, in half precision."""
    options, postprocess = model.inference_options, model.postprocess
    found: list[tuple[Candidates, torch.Tensor, tuple[int, int]]] = []
    model.inference_options = options._replace(rules=loosest)

    def keep(*arguments: Any) -> dict[str, Any]:
        found.append(arguments)
        return {}

    model.postprocess = keep
    mapper = PanopticDatasetMapper(cfg, False)
    for number, record in enumerate(tqdm.tqdm(records, desc="predict", disable=None)):
        model([mapper(record)])
        candidates, mask_logits, size = found.pop()
        path = folder / f"{number}.pt"
        torch.save((tuple(candidates), mask_logits.half(), size), path)
        yield path
    model.inference_options, model.postprocess = options, postprocess


class Predictions:
    """Stored predictions, merged and compared with the ground truth for any parameters."""

    def __init__(
        self,
        cfg: CfgNode,
        model: Any,
        dataset: str,
        records: Sequence[Mapping[str, Any]],
        files: Sequence[Path],
    ) -> None:
        """
        Args:
            cfg: the model's.
            model: whose predictions they are.
            dataset: registered with Detectron2.
            records: of the images.
            files: of :func:`store_predictions`, of the same images.
        """
        metadata = MetadataCatalog.get(dataset)
        self.model = model
        self.annotations: PanopticAnnotations = read_annotations(metadata.panoptic_json)
        self.renumbering = Renumbering.between(model_dataset(cfg), dataset)
        self.category_ids = {
            isthing: {v: k for k, v in metadata.get(f"{kind}_dataset_id_to_contiguous_id").items()}
            for isthing, kind in ((True, "thing"), (False, "stuff"))
        }
        self.is_mask_wise = cfg.MODEL.PSF.TEST.MERGING == "mask_wise"
        self.images = list(zip(records, files, strict=True))

    def measure(self, rules: MergingRules, thresholds: Sequence[float]) -> dict[float, Quality]:
        """The quality for each of some score thresholds, which rise; ``rules`` has the rest."""
        compared = [
            self._compare(record, file, rules, thresholds)
            for record, file in tqdm.tqdm(self.images, desc="merge", leave=False, disable=None)
        ]
        categories = self.annotations.categories
        found = {}
        for threshold, records in zip(thresholds, zip(*compared, strict=True), strict=True):
            counts = add_up(records, [category["id"] for category in categories])
            found[threshold] = Quality(*(row.pq for row in quality_rows(counts, categories)[:3]))
        return found

    def _compare(
        self,
        record: Mapping[str, Any],
        file: Path,
        rules: MergingRules,
        thresholds: Sequence[float],
    ) -> list[ImageRecord]:
        """Compare the prediction for an image with its ground truth, for each threshold."""
        columns, mask_logits, size = torch.load(file, weights_only=True)
        image_id = record["image_id"]
        truth_ids = read_panoptic_ids(record["pan_seg_file_name"])
        truth = (self.annotations.images or {})[image_id].segments

        def merge(threshold: float) -> tuple[np.ndarray, list[dict[str, Any]]]:
            options = self.model.inference_options
            new = rules._replace(score_threshold=threshold)
            self.model.inference_options = options._replace(rules=new)
            output = self.model.postprocess(Candidates(*columns), mask_logits.float(), size)
            self.model.inference_options = options
            ids, infos = self.renumbering(output)["panoptic_seg"]
            return ids.cpu().numpy().astype(np.uint32), infos

        by_number: dict[int, ImageRecord] = {}
        records = []
        ids, infos = merge(thresholds[0])
        for threshold in thresholds:
            if not self.is_mask_wise:
                by_number = {}
                ids, infos = merge(threshold)
            # Mask-wise, segments are numbered by falling score and take only what is left, so a
            # higher threshold takes the last ones away.
            number = sum(info["score"] >= threshold for info in infos)
            if number not in by_number:
                pred = {i["id"]: self._category_id(i) for i in infos[:number]}
                kept = np.where(ids <= number, ids, 0)
                by_number[number] = compare(truth_ids, truth, kept, pred, image_id=image_id)
            records.append(by_number[number])
        return records

    def _category_id(self, info: Mapping[str, Any]) -> int:
        return self.category_ids[bool(info["isthing"])][info["category_id"]]


def search(
    measure: Callable[[MergingRules], Mapping[float, Quality]],
    rules: MergingRules,
    grids: Mapping[str, Sequence[float]],
) -> tuple[MergingRules, Quality]:
    """
    Coordinate search: one parameter at a time, each with the best threshold, until none improves.

    Args:
        measure: the quality by threshold, for the other parameters.
        rules: where the search starts; of equally good parameters these stay.
        grids: the values to try, by the name of the parameter.

    Returns:
        The best parameters, and their quality.
    """
    start = rules.score_threshold
    known: dict[MergingRules, tuple[MergingRules, Quality]] = {}

    def best_threshold(candidate: MergingRules) -> tuple[MergingRules, Quality]:
        key = candidate._replace(score_threshold=0.0)
        if key not in known:
            by_threshold = measure(key)
            threshold = max(by_threshold, key=lambda t: (by_threshold[t].pq, t == start))
            known[key] = key._replace(score_threshold=threshold), by_threshold[threshold]
        return known[key]

    best = best_threshold(rules)
    while True:
        before = best
        for field, values in tqdm.tqdm(grids.items(), desc="search", disable=None):
            tried = [best, *(best_threshold(best[0]._replace(**{field: v})) for v in values)]
            best = max(tried, key=lambda found: found[1].pq)
        if best == before:
            return best


if __name__ == "__main__":
    main()
