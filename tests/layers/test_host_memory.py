import platform
import subprocess
import sys

import pytest

# Page faults while twelve tensors of 4 MB are made, written to and freed, ten times over.
SCRIPT = """
import resource
import torch
from psf.layers.host_memory import keep_freed_memory
keep_freed_memory()
def step():
    tensors = [torch.ones(2**20) for _ in range(12)]
for _ in range(5):  # until the freed pieces fit
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
def test_memory_is_not_fetched_again():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    pages = 10 * 12 * 4 * 2**20 // 4096
    assert int(result.stdout) < pages / 10
