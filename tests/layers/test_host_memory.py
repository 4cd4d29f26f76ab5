import platform
import subprocess
import sys

import pytest

# The median page faults of a step that fetches, fills and frees twelve pieces of 4 MB: the first
# steps, and perhaps a later one, let the heap grow until the freed pieces fit. Storages and not
# tensors, as the objects of tensors may come to lie behind the pieces, and then they stay anyway.
SCRIPT = """
import resource
import statistics
import sys
import torch
from psf.layers.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
storages = [torch.UntypedStorage(0) for _ in range(12)]
counts = []
for _ in range(21):
    counts.append(-resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    for storage in storages:
        storage.resize_(2**22)
        storage.fill_(1)
    for storage in storages:
        storage.resize_(0)
    counts[-1] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(statistics.median(counts))
"""


def faults_of_a_step(how: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
def test_memory_is_not_fetched_again():
    """Against the same steps by default, whose faults depend on the system's pages."""
    by_default = faults_of_a_step("default")
    if by_default < 100:
        pytest.skip(f"48 MB cost {by_default} page faults here: there is nothing to save")
    assert faults_of_a_step("keep") < by_default / 10
