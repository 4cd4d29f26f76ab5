"""Starting from a checkpoint of other classes: what belongs to a class is matched by its name.

Shapes: K and K' thing classes, T and T' stuff classes, of the checkpoint and of the model.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from psf.data.class_map import ClassNames
from psf.weights import Checkpointer

logger = logging.getLogger(__name__)

# Parameters with a row for each thing class, and with a row for each stuff class.
_THING_ROWS = re.compile(r"(^|\.)(class_heads|thing_heads)\.\d+\.(weight|bias)$")
_STUFF_ROWS = re.compile(r"(^|\.)stuff_query\.weight$")


class Matches(NamedTuple):
    """Where the classes of a model are in a checkpoint."""

    rows: list[int | None]  # of each class of the model; None: not in the checkpoint
    new: list[str]  # classes of the model that the checkpoint lacks
    unused: list[str]  # classes of the checkpoint that the model lacks


def match_names(theirs: Sequence[str], ours: Sequence[str]) -> Matches:
    """Match classes by name, upper and lower case being the same; each name once."""
    positions = {_normal(name): i for i, name in reversed(list(enumerate(theirs)))}
    rows = [positions.get(_normal(name)) for name in ours]
    wanted = {_normal(name) for name in ours}
    return Matches(
        rows=rows,
        new=[name for name, row in zip(ours, rows, strict=True) if row is None],
        unused=[name for name in theirs if _normal(name) not in wanted],
    )


def _normal(name: str) -> str:
    return name.strip().casefold()


def transfer_classes(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    things: Matches,
    stuff: Matches,
) -> dict[str, Tensor]:
    """
    Rearrange the rows of all parameters that have one for each class.

    Args:
        weights: the checkpoint's, with K or T rows.
        own: the model's freshly initialised state, with K' or T' rows.
        things: matches of K' classes.
        stuff: matches of T' classes.

    Returns:
        The weights with K' or T' rows: those of matched classes, else the model's own.
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
    """A checkpointer that saves the names of the classes and fits other ones to the model."""

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: ClassNames | None,
        weights_class_names: ClassNames | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: to load and save.
            save_dir: where checkpoints go.
            class_names: of the model; None: unknown, nothing is matched.
            weights_class_names: of weights that do not say themselves.
            checkpointables: what else is saved, as in Detectron2.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.class_names = class_names
        self.weights_class_names = weights_class_names

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, with the names of its classes."""
        if self.class_names is not None:
            kwargs["classes"] = {key: list(v) for key, v in self.class_names._asdict().items()}
        super().save(name, **kwargs)

    def _load_model(self, checkpoint: Any) -> Any:
        saved = checkpoint.pop("classes", None)
        theirs = ClassNames(**saved) if saved is not None else self.weights_class_names
        ours, weights = self.class_names, checkpoint["model"]
        has_heads = any(_THING_ROWS.search(name) for name in weights)
        if has_heads and theirs is not None and ours is not None and theirs != ours:
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
                "The weights know %d of the %d %s classes. From scratch: %s. Not needed: %s.",
                count - len(matches.new),
                count,
                kind,
                ", ".join(matches.new) or "none",
                ", ".join(matches.unused) or "none",
            )
        return transfer_classes(weights, self.model.state_dict(), things=things, stuff=stuff)
