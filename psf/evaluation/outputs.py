"""Checks of the model's output."""

from typing import Any


def require_output(
    inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], key: str, switch: str
) -> None:
    """Raise ValueError unless each output has a key, which ``MODEL.PSF.TEST.<switch>`` turns on."""
    for record, output in zip(inputs, outputs, strict=True):
        if key not in output:
            raise ValueError(
                f"The output for '{record['file_name']}' has no '{key}' but only {sorted(output)}. "
                f"Set MODEL.PSF.TEST.{switch} True to evaluate it."
            )
