"""``OUTPUT_DIR`` of a training: one run at a time, and a finished one is not overwritten."""

import contextlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from psf.weights import LAST_CHECKPOINT

logger = logging.getLogger(__name__)

LOCK = "training.lock"
CONFIG = "config.yaml"
METRICS = "metrics.json"


def require_folder(output_dir: str) -> None:
    """
    Create a folder.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(
            f"OUTPUT_DIR '{output_dir}' is not a folder that can be written ({error}). Set it to "
            "another."
        ) from error


def check_folder(output_dir: str, *, resume: bool) -> None:
    """
    Check that a training may write into a folder.

    Raises:
        ValueError: it has the checkpoints of a run that is not to be continued, or that cannot be,
            or a config that no run wrote.
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
    if not names and not tagged:
        _require_config_of_a_run(folder / CONFIG)
    if resume and not tagged:
        logger.warning("--resume: no checkpoint in '%s', the training starts anew", folder)


def _require_config_of_a_run(path: Path) -> None:
    """Refuse to overwrite a config that a person wrote: those of runs have all keys."""
    if path.is_file() and "\nCUDNN_BENCHMARK:" not in f"\n{path.read_text(errors='replace')}":
        raise ValueError(
            f"'{path}' would be overwritten by that of the training. Rename it, or set OUTPUT_DIR "
            "to another folder."
        )


@contextlib.contextmanager
def claimed(output_dir: str) -> Iterator[None]:
    """
    Keep other trainings out of a folder until this process ends or leaves.

    Raises:
        ValueError: another process trains into it.
    """
    with Path(output_dir, LOCK).open("a+", encoding="utf-8") as file:
        try:
            import fcntl  # not on Windows

            # The lock of a process: gone with it, however it ends, and not inherited by workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ValueError(
                f"Another training ({file.read()}) writes into OUTPUT_DIR '{output_dir}'. Stop it, "
                "or set OUTPUT_DIR to another folder."
            ) from error
        except (ImportError, OSError) as error:
            logger.warning("'%s' cannot be locked against other trainings: %s", output_dir, error)
        for leftover in Path(output_dir).glob("model_*.partial.pth"):
            leftover.unlink()  # a kill left it
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
