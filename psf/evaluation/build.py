"""Builds the evaluators of a data set."""

from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from .instance import InstanceEvaluator
from .panoptic import PanopticEvaluator
from .renumbering import Renumbering, RenumberingEvaluator
from .semantic import SemanticEvaluator


def build_evaluators(
    dataset_name: str,
    *,
    panoptic: bool,
    instances: bool,
    sem_seg: bool,
    output_dir: str | None,
    boundary_pq: bool = False,
    save_predictions: bool = False,
    model_dataset: str | None = None,
) -> DatasetEvaluator:
    """
    Build an evaluator for each output that is on: PQ, AP of instances, mIoU.

    Tables and predictions are written to ``output_dir``, unless it is None. ``model_dataset``
    numbers the model's classes; None: the evaluated data set does.

    Raises:
        ValueError: no output is on, or the data set lacks what an evaluator needs, or has other
            classes than the model.
    """
    evaluators: list[DatasetEvaluator] = []
    if panoptic:
        evaluators.append(
            PanopticEvaluator(
                dataset_name, output_dir, boundary=boundary_pq, save_predictions=save_predictions
            )
        )
    if instances:
        evaluators.append(InstanceEvaluator(dataset_name, output_dir))
    if sem_seg:
        evaluators.append(SemanticEvaluator(dataset_name, output_dir))
    if not evaluators:
        raise ValueError(
            f"Nothing to evaluate on '{dataset_name}': switch on at least one of "
            "MODEL.PSF.TEST.PANOPTIC_ON, INSTANCE_ON and SEMANTIC_ON."
        )
    evaluator = evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
    renumbering = Renumbering.between(model_dataset or dataset_name, dataset_name)
    return RenumberingEvaluator(evaluator, renumbering) if renumbering.is_needed else evaluator
