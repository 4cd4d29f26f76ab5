"""How OpenMP threads wait for each other on a CPU. Takes effect if imported before torch is loaded.

By default a waiting thread of libgomp, the OpenMP runtime of PyTorch's wheels for Linux, spins
300,000 times, for milliseconds, before it sleeps. Where another process needs the core, that delays
the thread that is waited for. Measured in docs/training_performance.md, "Threads on a CPU".
"""

import os

# Covers the gaps between the operators of a model.
SPIN_COUNT = 3000

# A setting of the user's own stays.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
