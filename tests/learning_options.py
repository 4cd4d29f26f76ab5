"""The options that learn faster than the paper's model, each alone and all together."""

from typing import Any

_LOCATION = "MODEL.PSF.LOCATION_DECODER"

_SINGLE: dict[str, list[Any]] = {
    "query selection": [f"{_LOCATION}.QUERY_SELECTION", True],
    "denoising": [f"{_LOCATION}.DENOISING.GROUPS", 2],
    "one-to-many": [f"{_LOCATION}.ONE_TO_MANY.QUERIES", 8, f"{_LOCATION}.ONE_TO_MANY.REPEATS", 3],
    "quality scores": ["MODEL.PSF.QUALITY_SCORES", True],
    "points": ["MODEL.PSF.MASK_POINTS.WEIGHT", 5.0, "MODEL.PSF.MASK_POINTS.NUM_POINTS", 40],
}

# KEY VALUE pairs; "joint" has all, "decoupled" has no points.
LEARNING_OPTIONS = {**_SINGLE, "all": [pair for pairs in _SINGLE.values() for pair in pairs]}
FOR_DECOUPLED = {
    "all but points": [x for name, pairs in _SINGLE.items() if name != "points" for x in pairs]
}
