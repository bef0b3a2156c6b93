"""Processes of one run: calls that fail in all or in none, a stop after one step, and the end."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

T = TypeVar("T")
STOPPED = {"SIGTERM": 143, "SIGUSR1": 143, "SIGINT": 130}
"""Signals that stop a run after its step, and its exit codes: two that batch systems send before
they take the machine away, and Control-C. 128 + N is how shells know signal N."""
AGAIN = 1.0
"""Seconds after which another Control-C is the user's, and not the same one by a launcher."""
STOPPING = b"\nstopping after this step with a checkpoint; Control-C once more stops at once\n"

_GROUPS: list[Any] = []
"""Every process group, so that none is freed before Python ends: torch joins a group's threads
while it holds Python's lock, which they may wait for. A process whose peer was killed hung so when
the frames of its error were freed."""


class Processes:
    """Rank and number of this run's processes, and their collective calls on host memory.

    These have a gloo group of their own: the messages are small, and need neither the
    accelerator's stream nor its backend.
    """

    def __init__(self, accelerator: Accelerator | None = None, *, timeout: int = 1800) -> None:
        """A process waits for the others for `timeout` seconds, and then raises."""
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.group: Any = None
        if self.count > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            _GROUPS.extend([dist.group.WORLD, self.group])

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks; all must call it."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_all(self, act: Callable[[], T]) -> T:
        """Call `act` in every process; when it fails in one, all raise ValueError and name it.

        Without this the others would wait for the one that failed, until a timeout.
        """
        if self.group is None:
            return act()
        result, error = None, None
        try:
            result = act()
        except Exception as raised:
            error = raised
        message = None if error is None else f"process {self.rank}: {error}"
        for failure in self.gather(message):
            if failure is not None:
                raise ValueError(failure) from error
        return result  # pyright: ignore[reportReturnType] # nobody failed, so act() returned

    def main_first(self, act: Callable[[], T]) -> T:
        """Call `act` in the main process, and then, with what it left on disk, in the others."""
        first = self.on_all(lambda: act() if self.rank == 0 else None)
        other = self.on_all(lambda: act() if self.rank > 0 else None)
        return first if self.rank == 0 else other  # pyright: ignore[reportReturnType]

    def on_main(self, act: Callable[[], T]) -> T:
        """Call `act` in the main process alone; all return its result, or raise if it fails."""
        result = self.on_all(lambda: act() if self.rank == 0 else None)
        if self.group is not None:
            box = [result]
            dist.broadcast_object_list(box, src=0, group=self.group)
            (result,) = box
        return result  # pyright: ignore[reportReturnType]


@contextmanager
def leaving() -> Iterator[None]:
    """Ends a process that has had others beside it as soon as the block ends, with its exit code.

    Python's own end is left out, for a group's thread that lets go of a tensor then asks for a lock
    that is no more, and aborts the process: "terminate called without an active exception".
    """
    try:
        yield
    except BaseException as error:
        _leave(error)
        raise
    _leave(None)


def _leave(error: BaseException | None) -> None:
    if not _GROUPS:
        if dist.is_initialized():  # of one process, or by a caller of its own
            dist.destroy_process_group()
        return
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    elif error is not None and not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        time.sleep(0.5)  # torchrun looks ten times a second, and names the one that ended first
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


class StopSignals:
    """Turns a signal of STOPPED in any process into a stop of all processes after the same step.

    The handler sets a flag, and little else is safe inside a handler. A second signal changes
    nothing, since launchers pass on signals that their workers already have from the system; but
    Control-C raises KeyboardInterrupt when it comes again later.
    Every step all-reduces the flags in the background: `ask` starts that, `answer` waits for it.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received = 0
        self._interrupted: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._flag: Tensor | None = None
        self._work: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others may not
            for name in STOPPED:
                number = getattr(signal, name, None)  # Windows has no SIGUSR1
                # A job in the background ignores Control-C, and goes on ignoring it.
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, STOPPED[signal.Signals(number).name])
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
                if self.processes.rank == 0:
                    os.write(2, STOPPING)  # print is not safe here
            elif now - self._interrupted > AGAIN:
                raise KeyboardInterrupt

    def ask(self) -> None:
        """Start to all-reduce whether any process has received a signal; all must call it."""
        if self.processes.group is not None:
            self._flag = torch.tensor([float(self.received)])
            self._work = dist.all_reduce(
                self._flag, dist.ReduceOp.MAX, group=self.processes.group, async_op=True
            )

    def answer(self) -> int:
        """The exit code if any process had received a signal when all called `ask`, or else 0."""
        if self._flag is None:
            return self.received
        self._work.wait()
        return int(self._flag)
