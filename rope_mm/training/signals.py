"""Ctrl-C and SIGTERM ask the run to save and stop after the current step; a second one stops it at once.

The evaluation of a step that is saved already is not waited for.

A run that saved because of SIGTERM has done what was asked, exit code 0; after Ctrl-C the code is 130, and
after a second signal n, which leaves no time to save, 128 + n.
"""

import signal
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

KILLED = 128  # plus the number of a signal: the exit code of what the signal ended

Result = TypeVar("Result")


class Interrupted(KeyboardInterrupt):
    """A signal ends what `Stop.unless_asked` calls."""


class Stop:
    """While entered, `asked` is the signal that asked the run to save and stop, or 0.

    with Stop() as stop:
        while not stop.asked: ...
    """

    def __init__(self):
        self.asked, self.waits = 0, True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt(KILLED + number)
        self.asked = number
        if not self.waits:
            raise Interrupted

    def unless_asked(self, function: Callable[[], Result], otherwise: Result) -> Result:
        """What a function returns; the first signal, also one before, ends it and gives another result.

        Args:
            function: is ended wherever it is.
            otherwise: the other result.
        """
        try:
            self.waits = False
            return otherwise if self.asked else function()
        except Interrupted:
            return otherwise
        finally:
            self.waits = True

    def __enter__(self) -> "Stop":
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def exit_code(asked: int) -> int:
    """The exit code of a run that saved because of this signal."""
    return 0 if asked == signal.SIGTERM else KILLED + asked
