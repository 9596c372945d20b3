"""Ctrl-C and SIGTERM as a wish to stop after the step at hand; a second one stops at once.

A run that saved because SIGTERM asked it to has done what it was asked: exit code 0. After Ctrl-C it is 130,
and after a second signal n, which leaves no time to save, 128 + n.
"""

import signal
from types import FrameType

KILLED = 128  # plus the number of a signal: how a shell counts what the signal ended


class Stop:
    """While entered, `asked` is the signal by which somebody wants the run to save and end, or 0.

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
    """How a run ends that has saved because of this signal."""
    return 0 if asked == signal.SIGTERM else KILLED + asked
