"""Ctrl-C and SIGTERM as a wish to stop after the step at hand; a second one stops at once.

A stopped run is not done, so it ends as if the signal had killed it: exit code 130 or 143.
"""

import signal
from types import FrameType


class Stop:
    """While entered, `asked` tells whether somebody wants the run to save and end.

    with Stop() as stop:
        while not stop.asked: ...
    """

    def __init__(self):
        self.asked = False
        self.signal = signal.SIGINT

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if self.asked:
            raise KeyboardInterrupt(self.signal)
        self.asked = True

    def __enter__(self) -> "Stop":
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
