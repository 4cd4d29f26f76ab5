"""SIGTERM, SIGHUP and Ctrl-C: the training ends after the iteration, with a checkpoint."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

from detectron2.checkpoint import Checkpointer
from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)

# Windows has no SIGHUP.
SIGNALS = [s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGHUP")]


class StopHook(HookBase):
    """
    Ends the process after the iteration in which a signal arrives, at once in an evaluation.

    It stands before the evaluation and after all hooks that change what a checkpoint holds. A
    second signal acts as without this hook.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self.received: signal.Signals | None = None
        self.finished = -1  # the last iteration that is complete
        self.in_iteration = False
        self.handlers: dict[signal.Signals, Any] = {}
        self.process = os.getpid()

    def before_train(self) -> None:
        """Take the signals over, except those that are ignored (as SIGHUP is under nohup)."""
        if threading.current_thread() is threading.main_thread():  # elsewhere Python cannot
            heeded = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
            self.handlers = {number: signal.signal(number, self._receive) for number in heeded}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a worker of the data loader, which the training ends
        self._restore()
        self.received = signal.Signals(number)
        if not self.in_iteration:
            raise SystemExit(128 + number)
        logger.warning("%s: stopping after this iteration", self.received.name)

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def before_step(self) -> None:
        """Note that the state is in change."""
        self.in_iteration = True

    def after_step(self) -> None:
        """Leave the training if a process received a signal, except after the last iteration."""
        self.finished = self.trainer.iter
        self.in_iteration = False
        received = [self.received]
        if comm.get_world_size() > 1:
            received = comm.all_gather(self.received)  # all leave after the same iteration
        self.received = next((one for one in received if one is not None), None)
        if self.received is not None and self.finished + 1 < self.trainer.max_iter:
            raise SystemExit(128 + self.received)

    def after_train(self) -> None:
        """Save what is complete, and say so."""
        self._restore()
        if self.received is None or self.finished + 1 >= self.trainer.max_iter:
            return
        if self.finished < 0:
            logger.warning("%s: stopped before the first iteration", self.received.name)
            return
        self.trainer.iter = self.finished
        name = f"model_{self.finished:07d}"
        self.checkpointer.save(name)
        logger.warning(
            "%s: stopped after iteration %d, '%s.pth' is saved. Continue with --resume.",
            self.received.name,
            self.finished,
            name,
        )
