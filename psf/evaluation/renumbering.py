"""From the numbers of the model's data set to those of the evaluated one."""

from typing import Any, NamedTuple

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from psf.data.class_map import ClassMap, model_classes


class Renumbering(NamedTuple):
    """The contiguous ids of the same classes in two data sets, in the model's order."""

    model: ClassMap
    data: ClassMap

    @classmethod
    def between(cls, model_dataset: str, dataset_name: str) -> "Renumbering":
        """
        Match the classes of two registered data sets by name.

        Raises:
            ValueError: they have different classes.
        """
        reference = MetadataCatalog.get(model_dataset)
        data = model_classes(MetadataCatalog.get(dataset_name), reference)
        return cls(ClassMap.from_metadata(reference), data)

    def __call__(self, output: dict[str, Any]) -> dict[str, Any]:
        """
        Renumber ``panoptic_seg``, ``instances`` and ``sem_seg`` of an output, where it has them.

        Args:
            output: of the model. Not modified.
        """
        if self.model == self.data:
            return output
        result = dict(output)
        if "panoptic_seg" in output:
            ids, infos = output["panoptic_seg"]
            result["panoptic_seg"] = (ids, [self._segment(info) for info in infos])
        if "instances" in output:
            things = zip(self.model.thing_ids, self.data.thing_ids, strict=True)
            table = torch.zeros(1 + max(self.model.thing_ids, default=0), dtype=torch.int64)
            for old, new in things:
                table[old] = new
            instances = output["instances"]
            result["instances"] = type(instances)(instances.image_size, **instances.get_fields())
            classes = instances.pred_classes
            result["instances"].pred_classes = table.to(classes.device)[classes]
        if "sem_seg" in output:  # channels in the order of contiguous ids
            theirs, ours = (torch.tensor([*m.thing_ids, *m.stuff_ids]) for m in self)
            channels = theirs.argsort().argsort()[ours.argsort()]
            result["sem_seg"] = output["sem_seg"][channels.to(output["sem_seg"].device)]
        return result

    def _segment(self, info: dict[str, Any]) -> dict[str, Any]:
        model_class = self.model.to_model(info["category_id"], is_thing=info["isthing"])
        return {**info, "category_id": self.data.to_contiguous(model_class)[0]}


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
