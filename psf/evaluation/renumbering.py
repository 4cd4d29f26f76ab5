"""From the numbers of the model's data set to those of the evaluated one."""

from typing import Any, NamedTuple

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from psf.data.class_map import ClassMap, shared_classes


class Renumbering(NamedTuple):
    """
    The contiguous ids of the same classes in two data sets, in the model's order.

    The evaluated data set may lack classes of the model. Predictions of these are dropped.
    """

    model: ClassMap  # all of the model's
    shared: ClassMap  # the model's ids of the classes that the data set has
    data: ClassMap  # the data set's ids of the same classes

    @classmethod
    def between(cls, model_dataset: str, dataset_name: str) -> "Renumbering":
        """
        Match the classes of two registered data sets by name.

        Raises:
            ValueError: the data set has classes that the model does not have.
        """
        reference = MetadataCatalog.get(model_dataset)
        shared = shared_classes(MetadataCatalog.get(dataset_name), reference)
        return cls(ClassMap.from_metadata(reference), *shared)

    @property
    def is_needed(self) -> bool:
        """Whether any number changes."""
        return self.model != self.data

    def __call__(self, output: dict[str, Any]) -> dict[str, Any]:
        """An output with ``panoptic_seg``, ``instances`` and ``sem_seg`` renumbered: a copy."""
        if not self.is_needed:
            return output
        result = dict(output)
        things, stuff = (
            dict(zip(*ids, strict=True)) for ids in zip(self.shared, self.data, strict=True)
        )
        if "panoptic_seg" in output:
            ids, infos = output["panoptic_seg"]
            kept = [i for i in infos if i["category_id"] in (things if i["isthing"] else stuff)]
            if len(kept) < len(infos):
                known = torch.tensor([i["id"] for i in kept], dtype=ids.dtype, device=ids.device)
                ids = ids.where(torch.isin(ids, known), 0)
            new = [
                {**i, "category_id": (things if i["isthing"] else stuff)[i["category_id"]]}
                for i in kept
            ]
            result["panoptic_seg"] = (ids, new)
        if "instances" in output:
            classes = output["instances"].pred_classes.tolist()
            chosen = [i for i, c in enumerate(classes) if c in things]
            instances = output["instances"][torch.tensor(chosen, dtype=torch.int64)]
            instances.pred_classes = torch.tensor([things[classes[i]] for i in chosen]).to(
                output["instances"].pred_classes
            )
            result["instances"] = instances
        if "sem_seg" in output:  # channels in the order of contiguous ids
            theirs = sorted([*self.model.thing_ids, *self.model.stuff_ids])
            old = {new: old for kind in (things, stuff) for old, new in kind.items()}
            result["sem_seg"] = output["sem_seg"][[theirs.index(old[new]) for new in sorted(old)]]
        return result


class RenumberingEvaluator(DatasetEvaluator):
    """Renumbers the outputs of the model before they are evaluated."""

    def __init__(self, evaluator: DatasetEvaluator, renumbering: Renumbering) -> None:
        self.evaluator = evaluator
        self.renumbering = renumbering

    def reset(self) -> None:
        self.evaluator.reset()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        self.evaluator.process(inputs, [self.renumbering(output) for output in outputs])

    def evaluate(self) -> Any:
        return self.evaluator.evaluate()
