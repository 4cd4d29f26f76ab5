"""The model's classes and a data set's contiguous ids.

The model numbers classes 0..K-1 (things) and K..K+T-1 (stuff). Detectron2's metadata may
number them in any order (ADE20K and Cityscapes interleave things and stuff).
"""

from typing import Any, NamedTuple


class ClassMap(NamedTuple):
    """The contiguous id of every class of the model, in the model's order."""

    thing_ids: tuple[int, ...]  # K contiguous ids of things
    stuff_ids: tuple[int, ...]  # T contiguous ids of stuff

    @classmethod
    def from_metadata(cls, metadata: Any) -> "ClassMap":
        """
        Read the classes of a data set registered with Detectron2.

        Args:
            metadata: an entry of ``MetadataCatalog`` with ``thing_dataset_id_to_contiguous_id`` and
                ``stuff_dataset_id_to_contiguous_id``. As in Mask2Former's registrations, the second
                may list the things too; what both list is a thing.

        Raises:
            ValueError: the metadata lacks the id maps.
        """
        for key in ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"):
            if not hasattr(metadata, key):
                raise ValueError(
                    f"The metadata of data set '{metadata.name}' has no '{key}'. Is the data set "
                    "registered? Import the module that registers it before building the model, or "
                    "correct DATASETS.TRAIN / DATASETS.TEST."
                )
        things: dict[int, int] = metadata.thing_dataset_id_to_contiguous_id
        stuff: dict[int, int] = metadata.stuff_dataset_id_to_contiguous_id
        return cls(
            thing_ids=tuple(sorted(things.values())),
            stuff_ids=tuple(sorted(v for k, v in stuff.items() if k not in things)),
        )

    def to_model(self, contiguous_id: int, *, is_thing: bool) -> int:
        """The model's class of a segment (things and stuff may share contiguous ids)."""
        if is_thing:
            return self.thing_ids.index(contiguous_id)
        return len(self.thing_ids) + self.stuff_ids.index(contiguous_id)

    def to_contiguous(self, model_class: int) -> tuple[int, bool]:
        """The contiguous id of one of the model's classes, and whether it is a thing."""
        if model_class < len(self.thing_ids):
            return self.thing_ids[model_class], True
        return self.stuff_ids[model_class - len(self.thing_ids)], False


class ClassNames(NamedTuple):
    """The names of the model's classes, in the model's order."""

    things: list[str]  # K
    stuff: list[str]  # T

    @classmethod
    def from_metadata(cls, metadata: Any) -> "ClassNames | None":
        """The names of a data set registered with Detectron2; None where it has none."""
        class_map = ClassMap.from_metadata(metadata)
        names = [metadata.get(key) for key in ("thing_classes", "stuff_classes")]
        if None in names:
            return None
        ids = (class_map.thing_ids, class_map.stuff_ids)
        return cls(*([n[i] for i in kind] for n, kind in zip(names, ids, strict=True)))
