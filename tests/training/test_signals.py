import os
import signal
from dataclasses import dataclass

import pytest

from rope_mm.training.config import run
from rope_mm.training.signals import Stop, exit_code

SIGNALS = signal.SIGINT, signal.SIGTERM


@dataclass(frozen=True)
class Empty:
    """Nothing to set."""


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_for_a_stop_and_the_second_stops_at_once(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked == number
        with pytest.raises(KeyboardInterrupt, match=f"^{128 + number}$"):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_run_that_saved_ends_well_after_sigterm_and_as_interrupted_after_ctrl_c():
    assert [exit_code(number) for number in SIGNALS] == [130, 0]


@pytest.mark.parametrize(("raised", "code"), [((), 130), ((0,), 0), ((143,), 143)])
def test_an_interruption_ends_a_script_with_its_code(raised, code):
    def main(config):
        raise KeyboardInterrupt(*raised)

    with pytest.raises(SystemExit, match=f"^{code}$"):
        run(main, Empty, [])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_what_need_not_be_waited_for(number):
    done = []

    def interrupted():
        os.kill(os.getpid(), number)
        done.append("never")

    with Stop() as stop:
        assert stop.unless_asked(lambda: 1, 2) == 1
        assert stop.unless_asked(interrupted, 2) == 2 and stop.asked == number
        assert stop.unless_asked(lambda: 1, 2) == 2  # asked before
        with pytest.raises(KeyboardInterrupt, match=f"^{128 + number}$"):
            os.kill(os.getpid(), number)
    assert not done
