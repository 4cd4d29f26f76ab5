"""The model's classes and a data set's contiguous ids.

The model numbers classes 0..K-1 (things) and K..K+T-1 (stuff). Detectron2's metadata may
number them in any order (ADE20K and Cityscapes interleave things and stuff).
"""

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from detectron2.utils.logger import log_first_n

from .annotations import normal_name

# Data sets are matched at the start and at every evaluation.
_log_once = partial(log_first_n, key="message", name=__name__)


class ClassMap(NamedTuple):
    """The contiguous id of every class of the model, in the model's order."""

    thing_ids: tuple[int, ...]  # K contiguous ids of things
    stuff_ids: tuple[int, ...]  # T contiguous ids of stuff

    @classmethod
    def from_metadata(cls, metadata: Any) -> "ClassMap":
        """
        Read the classes of a data set registered with Detectron2.

        As in Mask2Former's registrations, ``stuff_dataset_id_to_contiguous_id`` may list the things
        too; what both maps list is a thing.

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


def model_classes(metadata: Any, reference: Any) -> ClassMap:
    """As :func:`shared_classes`, of a data set that has all classes of the model: its ids."""
    return shared_classes(metadata, reference, may_lack=False)[1]


def shared_classes(
    metadata: Any, reference: Any, *, may_lack: bool = True
) -> tuple[ClassMap, ClassMap]:
    """
    Match the classes of a data set and of the model's data set.

    Classes are matched by name, things and stuff on their own. Where classes of one kind share a
    name, the data set's ids decide. With ``may_lack`` it may have fewer classes than the model.

    Returns:
        The contiguous ids of the shared classes in the reference and in the data set, in the order
        of the model's classes.

    Raises:
        ValueError: the data set has other classes, or the two differ and have no names.
    """
    own, wanted = ClassMap.from_metadata(metadata), ClassMap.from_metadata(reference)
    theirs, ours = _distinct_names(metadata), _distinct_names(reference)
    if theirs is None or ours is None:
        if own != wanted:
            raise ValueError(
                f"The classes of '{metadata.name}' and '{reference.name}' differ, and cannot be "
                "matched without names. Set thing_classes and stuff_classes in their metadata."
            )
        return wanted, own
    positions = align_names(
        theirs,
        ours,
        theirs_of=f"data set '{metadata.name}'",
        ours_of=f"'{reference.name}'",
        mend="List the same categories in both JSON files, in any order",
        may_lack=may_lack,
    )
    pairs = [
        [(ids[i], theirs_ids[j]) for i, j in enumerate(kind) if j is not None]
        for ids, theirs_ids, kind in zip(wanted, own, positions, strict=True)
    ]
    return ClassMap(*(tuple(i for i, _ in kind) for kind in pairs)), ClassMap(
        *(tuple(j for _, j in kind) for kind in pairs)
    )


def _distinct_names(metadata: Any) -> ClassNames | None:
    """The class names of a data set; names that repeat have the data set's id added."""
    names = ClassNames.from_metadata(metadata)
    if names is None:
        return None
    class_map = ClassMap.from_metadata(metadata)
    distinct = []
    for kind, contiguous_ids, key in zip(names, class_map, ("thing", "stuff"), strict=True):
        dataset_ids = metadata.get(f"{key}_dataset_id_to_contiguous_id")
        ids = {contiguous: dataset_id for dataset_id, contiguous in dataset_ids.items()}
        count = Counter(map(normal_name, kind))
        distinct.append(
            [
                name if count[normal_name(name)] == 1 else f"{name} (id {ids[i]})"
                for name, i in zip(kind, contiguous_ids, strict=True)
            ]
        )
    return ClassNames(*distinct)


def align_names(
    theirs: ClassNames,
    ours: ClassNames,
    *,
    theirs_of: str,
    ours_of: str,
    mend: str,
    may_lack: bool = False,
) -> tuple[list[int | None], list[int | None]]:
    """
    Find the same classes in another order, and log a line if it is another one.

    The messages say whose names they are (``theirs_of``, such as "data set 'x'") and what to do
    (``mend``). With ``may_lack`` they may have fewer classes.

    Returns:
        The positions in ``theirs`` of our things and of our stuff; None: they lack the class.

    Raises:
        ValueError: not all classes of one are classes of the other.
    """
    problems: list[str] = []
    lacking: list[str] = []
    orders: list[list[int | None]] = []
    for kind, found, wanted in zip(("thing", "stuff"), theirs, ours, strict=True):
        names, wanted_names = ([normal_name(n) for n in part] for part in (found, wanted))
        lacking += [n for n in wanted_names if n not in names]
        problems += _differences(kind, names, wanted_names, may_lack=may_lack)
        orders.append([names.index(n) if n in names else None for n in wanted_names])
    if problems:
        raise ValueError(
            f"The classes of {theirs_of} are not those of {ours_of}: {'; '.join(problems)}. {mend}."
        )
    if lacking:
        _log_once(
            logging.WARNING,
            f"Of the classes of {ours_of}, {theirs_of} lacks {len(lacking)}: {_shorten(lacking)}. "
            "Its own classes are evaluated, and predictions of the others left out.",
        )
    found_orders = [[i for i in order if i is not None] for order in orders]
    if any(order != sorted(order) for order in found_orders):
        _log_once(
            logging.INFO,
            f"The classes of {theirs_of} stand in another order than those of {ours_of}; matched "
            "by name.",
        )
    return orders[0], orders[1]


def _differences(
    kind: str, theirs: Sequence[str], ours: Sequence[str], *, may_lack: bool
) -> list[str]:
    missing = [] if may_lack else [name for name in ours if name not in theirs]
    more = [name for name in theirs if name not in ours]
    repeated = [n for n, count in Counter(theirs).items() if count > 1 and theirs != ours]
    parts = (("missing", missing), ("only there", more), ("repeated", repeated))
    return [f"{kind} classes {what}: {_shorten(names)}" for what, names in parts if names]


def _shorten(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
