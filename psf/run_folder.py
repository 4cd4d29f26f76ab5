"""``OUTPUT_DIR`` of a training: one run at a time, and a finished one is not overwritten."""

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from psf.weights import LAST_CHECKPOINT

logger = logging.getLogger(__name__)

LOCK = "training.lock"
CONFIG = "config.yaml"
METRICS = "metrics.json"


def check_folder(output_dir: str, *, resume: bool) -> None:
    """
    Check that a training may write into a folder.

    Raises:
        ValueError: it has the checkpoints of a run that is not to be continued, or that cannot be.
    """
    folder = Path(output_dir)
    names = [
        path.name for path in sorted(folder.glob("model_*.pth")) if ".partial" not in path.name
    ]
    tagged = (folder / LAST_CHECKPOINT).is_file()
    if not resume and (names or tagged):
        raise ValueError(
            f"OUTPUT_DIR '{folder}' holds a training already "
            f"({names[-1] if names else LAST_CHECKPOINT}). Add --resume to continue it, set "
            "OUTPUT_DIR to another folder to start a new one, or move that one away."
        )
    if resume and names and not tagged:
        raise ValueError(
            f"--resume: OUTPUT_DIR '{folder}' has checkpoints ({names[-1]}) but no "
            f"'{LAST_CHECKPOINT}'. Write the name of the checkpoint to continue from into it."
        )
    if resume and not tagged:
        logger.warning("--resume: no checkpoint in '%s', the training starts anew", folder)


@contextlib.contextmanager
def claimed(output_dir: str) -> Iterator[None]:
    """
    Keep other trainings out of a folder, which is created, until this process ends or leaves.

    Raises:
        ValueError: another process trains into it.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    with Path(output_dir, LOCK).open("a+", encoding="utf-8") as file:
        try:
            # The lock of a process: gone with it, however it ends, and not inherited by workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ValueError(
                f"Another training ({file.read()}) writes into OUTPUT_DIR '{output_dir}'. Stop it, "
                "or set OUTPUT_DIR to another folder."
            ) from error
        except OSError as error:
            logger.warning("'%s' cannot be locked against other trainings: %s", output_dir, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def cut_metrics(output_dir: str, last_iteration: int) -> None:
    """
    Cut ``metrics.json`` after an iteration, and a last line that a kill left unfinished.

    What follows is of iterations that are trained again, or of a run that left no checkpoint.
    """
    path = Path(output_dir, METRICS)
    if not path.is_file():
        return
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or _iteration(line) > last_iteration:
            break
        size += len(line)
    if size < path.stat().st_size:
        logger.info("'%s': removed what was logged after iteration %d", path, last_iteration)
        os.truncate(path, size)


def _iteration(line: bytes) -> float:
    """The iteration of a line of metrics; -1 for a damaged one."""
    try:
        return float(json.loads(line)["iteration"])
    except (KeyError, TypeError, ValueError):
        return -1
