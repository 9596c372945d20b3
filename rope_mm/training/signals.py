"""Ctrl-C and SIGTERM ask the run to save and stop after the current step; a second one stops it at once.

A run that saved because of SIGTERM has done what was asked, exit code 0; after Ctrl-C the code is 130, and
after a second signal n, which leaves no time to save, 128 + n.
"""

import signal
from types import FrameType

KILLED = 128  # plus the number of a signal: the exit code of what the signal ended


class Stop:
    """While entered, `asked` is the signal that asked the run to save and stop, or 0.

    with Stop() as stop:
        while not stop.asked: ...
    """

    def __init__(self):
        self.asked = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt(KILLED + number)
        self.asked = number

    def __enter__(self) -> "Stop":
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def exit_code(asked: int) -> int:
    """The exit code of a run that saved because of this signal."""
    return 0 if asked == signal.SIGTERM else KILLED + asked
