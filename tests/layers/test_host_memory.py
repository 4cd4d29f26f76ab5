import platform
import subprocess
import sys
from pathlib import Path

import pytest

import psf.layers.host_memory

# The median page faults of a step that allocates, fills and frees twelve blocks of 4 MB, by default
# and then with freed memory kept. The module is run as a file: importing psf takes seconds.
SCRIPT = """
import resource
import runpy
import statistics
import sys

def faults_of_a_step():
    counts = []
    for _ in range(21):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [bytearray(2**22) for _ in range(12)]
        del blocks
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return statistics.median(counts)

print(faults_of_a_step())
runpy.run_path(sys.argv[1])["keep_freed_memory"]()
print(faults_of_a_step())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
def test_memory_is_not_allocated_again():
    path = Path(psf.layers.host_memory.__file__)
    command = [sys.executable, "-c", SCRIPT, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    by_default, kept = map(float, result.stdout.split())
    if by_default < 100:
        pytest.skip(f"48 MB cost {by_default} page faults here: there is nothing to save")
    assert kept < by_default / 10
