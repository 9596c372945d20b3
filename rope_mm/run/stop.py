"""Ctrl-C and SIGTERM as a wish to stop after the step at hand; a second one stops at once."""

import signal
from types import FrameType


class Stop:
    """While entered, `asked` tells whether somebody wants the run to save and end.

    with Stop() as stop:
        while not stop.asked: ...
    """

    def __init__(self):
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> "Stop":
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
