"""Fine-tuning from a checkpoint of other classes: weights of a class are matched by its name.

Shapes: K thing and T stuff classes of the checkpoint, K' and T' of the model.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from psf.checkpoint import AUTHORS
from psf.data import categories
from psf.data.annotations import TEXT, Keys, find_misfit, normal_name
from psf.data.class_map import ClassNames, align_names
from psf.ema import ModelEma
from psf.weights import Checkpointer, Origin

logger = logging.getLogger(__name__)

# Parameters with one row per thing class, and with one row per stuff class.
_THING_ROWS = re.compile(
    r"(^|\.)(class_heads\.\d+|thing_heads\.\d+|selection\.class_head|label_embed)\.(weight|bias)$"
)
_STUFF_ROWS = re.compile(r"(^|\.)stuff_query\.weight$")

# The authors' released models are of COCO, in the order of its categories.
RELEASED_CLASSES = ClassNames(
    *([c["name"] for c in categories.COCO if c["isthing"] == kind] for kind in (1, 0))
)

_NAMES = (lambda v: type(v) is list and all(map(TEXT[0], v)), "a list of names")
_CLASSES: Keys = {"things": _NAMES, "stuff": _NAMES}


class Matches(NamedTuple):
    """Classes of a model and of a checkpoint, matched."""

    rows: list[int | None]  # row in the checkpoint of each class of the model; None: it has none
    new: list[str]  # classes of the model that are not in the checkpoint
    unused: list[str]  # classes of the checkpoint that are not in the model


def match_names(theirs: Sequence[str], ours: Sequence[str]) -> Matches:
    """Match classes by name, ignoring case; of a repeated name the first class counts."""
    positions = {normal_name(name): i for i, name in reversed(list(enumerate(theirs)))}
    rows = [positions.get(normal_name(name)) for name in ours]
    wanted = {normal_name(name) for name in ours}
    return Matches(
        rows=rows,
        new=[name for name, row in zip(ours, rows, strict=True) if row is None],
        unused=[name for name in theirs if normal_name(name) not in wanted],
    )


def transfer_classes(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    things: Matches,
    stuff: Matches,
) -> dict[str, Tensor]:
    """
    Rearrange the rows of all parameters with one row per class, K or T of the checkpoint.

    Returns:
        The weights with K' or T' rows: the checkpoint's for matched classes, else those of the
        newly initialized model (``own``).
    """
    result = dict(weights)
    for pattern, matches in ((_THING_ROWS, things), (_STUFF_ROWS, stuff)):
        for name in filter(pattern.search, weights.keys() & own.keys()):
            rows = own[name].detach().cpu().clone()
            for i, row in enumerate(matches.rows):
                if row is not None:
                    rows[i] = weights[name][row]
            result[name] = rows
    return result


class ClassCheckpointer(Checkpointer):
    """A checkpointer that saves class names, and loads checkpoints of other classes by name."""

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: ClassNames | None,
        weights_class_names: ClassNames | None = None,
        same_classes: bool = False,
        ema: ModelEma | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: to load and save.
            save_dir: folder of the checkpoints.
            class_names: of the model; None: unknown, classes are not matched.
            weights_class_names: classes of checkpoints that do not name theirs; None: those of
                the authors' released models have COCO's.
            same_classes: refuse checkpoints that have not the same classes, in any order: for
                inference, where a new class would be predicted with random weights.
            ema: average of the model's weights, which is saved as the model.
            checkpointables: other objects to save, as in Detectron2.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.class_names = class_names
        self.weights_class_names = weights_class_names
        self.same_classes = same_classes
        self.ema = ema

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model with the names of its classes."""
        if self.class_names is not None:
            kwargs["classes"] = {key: list(v) for key, v in self.class_names._asdict().items()}
        if self.ema is not None:
            kwargs["model"] = self.ema.state_dict()
        super().save(name, **kwargs)

    def _load_model(self, checkpoint: Any) -> Any:
        saved = checkpoint.pop("classes", None)
        misfit = None if saved is None else find_misfit(saved, _CLASSES)
        if misfit:
            raise ValueError(f"'classes' in the checkpoint: {misfit}. Remove it from the file")
        ours, weights = self.class_names, checkpoint["model"]
        theirs, source = self.weights_class_names, "MODEL.PSF.WEIGHTS_DATASET"
        if saved is not None:
            theirs, source = ClassNames(**saved), "The entry 'classes' of the checkpoint"
        elif theirs is None:
            theirs = _released_classes(checkpoint.get("origin"), weights)
        has_heads = any(_THING_ROWS.search(name) for name in weights)
        if has_heads and theirs is not None and ours is not None and theirs != ours:
            _check_counts(theirs, weights, source)
            if self.same_classes:
                align_names(
                    theirs,
                    ours,
                    theirs_of="the checkpoint",
                    ours_of="the model's data set",
                    mend="Let DATASETS.TRAIN begin with the data set that it was trained on",
                )
            for rows_of_classes in ("optimizer", "ema"):
                checkpoint.get("trainer", {}).get("_trainer", {}).pop(rows_of_classes, None)
            checkpoint = {**checkpoint, "model": self._fit(weights, theirs, ours)}
        return super()._load_model(checkpoint)

    def _fit(
        self, weights: Mapping[str, Any], theirs: ClassNames, ours: ClassNames
    ) -> dict[str, Any]:
        self._convert_ndarray_to_tensor(weights)
        things = match_names(theirs.things, ours.things)
        stuff = match_names(theirs.stuff, ours.stuff)
        for kind, matches in (("thing", things), ("stuff", stuff)):
            count = len(matches.rows)
            logger.info(
                "The checkpoint has %d of the %d %s classes. Randomly initialized: %s. Unused: %s.",
                count - len(matches.new),
                count,
                kind,
                ", ".join(matches.new) or "none",
                ", ".join(matches.unused) or "none",
            )
        return transfer_classes(weights, self.model.state_dict(), things=things, stuff=stuff)


def _check_counts(classes: ClassNames, weights: Mapping[str, Any], source: str) -> None:
    """Raise ValueError unless there is a name for each row of classes."""
    for names, pattern in zip(classes, (_THING_ROWS, _STUFF_ROWS), strict=True):
        for name in filter(pattern.search, weights):
            if len(weights[name]) not in (len(names), max(1, len(names))):  # one embedding at least
                raise ValueError(
                    f"{source} names {len(names)} classes, but the checkpoint has "
                    f"{len(weights[name])} of this kind ({name})."
                )


def _released_classes(origin: Origin | None, weights: Mapping[str, Tensor]) -> ClassNames | None:
    """COCO's classes, if the weights are the authors' and have as many; None: unknown."""
    if origin is None or origin.source not in AUTHORS:
        return None
    rows = [
        {len(value) for name, value in weights.items() if pattern.search(name)}
        for pattern in (_THING_ROWS, _STUFF_ROWS)
    ]
    return RELEASED_CLASSES if rows == [{len(kind)} for kind in RELEASED_CLASSES] else None
