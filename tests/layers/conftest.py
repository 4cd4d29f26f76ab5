"""The devices that the tests of the operator run on."""

import contextlib

import pytest
import torch

from psf.layers.ms_deform_attn import KERNEL_DEVICES, has_extension

# Without kernels for CUDA, plain PyTorch there is left to the run of the tests without the library.
DEVICES = ["cpu"]
if torch.cuda.is_available() and ("cuda" in KERNEL_DEVICES or not has_extension()):
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))


@pytest.fixture(params=DEVICES)
def device(request):
    """The device that tensors are made on unless another is named."""
    with contextlib.nullcontext() if request.param == "cpu" else torch.device(request.param):
        yield request.param
