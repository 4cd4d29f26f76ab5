"""Precisions that a device computes in; without instructions for one it takes far longer."""

import functools
import logging
import re
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

CPU_INFO = Path("/proc/cpuinfo")

# What Linux calls the instructions, on x86 and ARM.
_INSTRUCTIONS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16", "svebf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def usable_precision(precision: str, device: str | torch.device, option: str) -> str:
    """
    The precision, or "float32" where the device would take several times as long.

    A line in the log then names the option that asks for it.
    """
    kind = torch.device(device).type
    if precision not in _INSTRUCTIONS or kind not in ("cpu", "cuda"):
        return precision
    if kind == "cuda":
        is_fast = precision == "float16" or gpu_has_bfloat16()
    else:
        is_fast = bool(_INSTRUCTIONS[precision] & _flags(CPU_INFO))
    if is_fast:
        return precision
    logger.warning(
        "%s: this %s has no instructions for %s and would take several times as long. "
        "float32 is used.",
        *(option, "GPU" if kind == "cuda" else "processor", precision),
    )
    return "float32"


def gpu_has_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16; older ones emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _flags(cpu_info: Path) -> frozenset[str]:
    """The instructions of the processor; none are known where there is no such file."""
    text = cpu_info.read_text(encoding="utf-8") if cpu_info.is_file() else ""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(lines[0].split()) if lines else frozenset()


def require_device(name: str) -> None:
    """Raise ValueError unless ``MODEL.DEVICE`` is a device that is here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE is '{name}', which is no device of PyTorch") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"MODEL.DEVICE is '{name}', but there are {torch.cuda.device_count()} CUDA devices. "
            "Set it to cpu, or install PyTorch for the GPU and its driver"
        )
