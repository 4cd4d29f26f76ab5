"""What trainings and evaluations show on the terminal; ``log.txt`` has everything."""

import datetime
import logging
import sys
import time

from detectron2.engine import HookBase
from detectron2.utils.logger import setup_logger

logger = logging.getLogger(__name__)

LOGGERS = ("fvcore", "detectron2", "psf")

# Reports an evaluation's progress every five seconds.
_EVALUATOR = "detectron2.evaluation.evaluator"


def log_to(output_dir: str, *, rank: int, hidden: tuple[str, ...] = ()) -> None:
    """
    Log to ``log.txt`` in a folder; on the main process, show the essential lines on the terminal.

    These are the project's own and all warnings and errors. Of long evaluations there is a line
    every half minute.

    Args:
        output_dir: the folder.
        rank: of this process.
        hidden: names of loggers of the project whose information is not shown.
    """
    for name in LOGGERS:
        own = setup_logger(output_dir, distributed_rank=rank, name=name, configure_stdout=False)
        for handler in [h for h in own.handlers if isinstance(h, _Terminal)]:
            own.removeHandler(handler)  # of an earlier call in this process
        if rank == 0:
            own.addHandler(_Terminal(hidden))


class _Terminal(logging.StreamHandler):
    """Shows the essential lines, without the names of their loggers."""

    def __init__(self, hidden: tuple[str, ...]) -> None:
        super().__init__(sys.stdout)
        self.hidden = hidden
        self.evaluated = 0.0  # when the progress of an evaluation was last shown, or it began

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            return True
        if record.name == _EVALUATOR:
            is_start = record.getMessage().startswith("Start")
            due = record.created - self.evaluated >= 30 and not is_start
            if due or is_start:
                self.evaluated = record.created
            return due
        is_own = record.levelno == logging.INFO and f"{record.name}.".startswith("psf.")
        return is_own and not record.name.startswith(self.hidden)

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        return f"[{time.strftime('%H:%M:%S')}] {level}{super().format(record)}"


class ProgressHook(HookBase):
    """
    Logs a line every so often: iteration, loss, the last PQ, time per iteration, time left.

    There are about a hundred lines, 10 to 60 seconds apart, and one after each evaluation. It
    stands behind the evaluation.
    """

    def before_train(self) -> None:
        """Start the clock."""
        self.last = time.perf_counter()

    def after_step(self) -> None:
        """Log a line if it is time."""
        done, total = self.trainer.iter + 1, self.trainer.max_iter
        histories = self.trainer.storage.histories()
        seconds = histories["time"].median(200) if "time" in histories else None
        interval = min(max((seconds or 0) * total / 100, 10.0), 60.0)
        results = {
            key.rpartition("/")[2]: value_and_iteration
            for key, value_and_iteration in reversed(self.trainer.storage.latest().items())
            if "/panoptic_seg/" in f"/{key}"  # of several data sets, the first stays
        }
        is_new = "PQ" in results and results["PQ"][1] == self.trainer.iter
        if not (is_new or done == total or time.perf_counter() - self.last >= interval):
            return
        self.last = time.perf_counter()
        columns = [f"iteration {done}/{total}", f"loss {histories['total_loss'].median(20):.4g}"]
        if results:
            shown = ("PQ", "PQ_th", "PQ_st") if is_new else ("PQ",)
            columns.append(" ".join(f"{key} {results[key][0]:.2f}" for key in shown))
        if seconds is not None:
            left = datetime.timedelta(seconds=round(seconds * (total - done)))
            columns += [f"{seconds:.3g} s/iteration", f"{left} left"]
        logger.info("  ".join(columns))
