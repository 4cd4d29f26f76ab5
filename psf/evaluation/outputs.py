"""Checks of the model's output."""

from typing import Any


def require_output(
    inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], key: str, switch: str
) -> None:
    """
    Check that each output has what is evaluated.

    Args:
        inputs: ``file_name`` of each image.
        outputs: the model's output for each image.
        key: the required key.
        switch: the config key under ``MODEL.PSF.TEST`` that switches it on.

    Raises:
        ValueError: an output lacks it.
    """
    for record, output in zip(inputs, outputs, strict=True):
        if key not in output:
            raise ValueError(
                f"The output for '{record['file_name']}' has no '{key}' but only {sorted(output)}. "
                f"Set MODEL.PSF.TEST.{switch} True to evaluate it."
            )
