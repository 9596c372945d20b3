from dataclasses import dataclass, field

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from rope_mm.training import trackers
from rope_mm.training.metrics_log import Log
from rope_mm.training.trackers import read_trackers, tracking


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Example:
    steps: int = 2
    paths: list[str] = field(default_factory=lambda: ["digits"])
    optim: Optim = field(default_factory=Optim)


class Stub(GeneralTracker):
    """A tracker that remembers what it is told."""

    name = "stub"
    requires_logging_directory = False

    def __init__(self):
        super().__init__(_blank=True)
        self.lines, self.config, self.finished = [], None, False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **more):
        self.lines.append((step, values))

    def finish(self):
        self.finished = True


def test_trackers_receive_the_configuration_and_every_logged_line(tmp_path):
    stub = Stub()
    accelerator = Accelerator(log_with=[stub])
    with (
        tracking(accelerator, tmp_path / "run", Example()),
        Log(tmp_path, total=2, also=accelerator.log) as log,
    ):
        log(1, {"tokens/s": 5.0}, words=2.0)
        log(2, warning="it diverges")
    assert stub.config == {"steps": 2, "paths": "['digits']", "optim.lr": 0.1}
    assert stub.lines == [(1, {"words": 2.0, "tokens/s": 5.0}), (2, {"warning": "it diverges"})]
    assert stub.finished


def test_a_run_without_trackers_sends_nothing(tmp_path):
    accelerator = Accelerator(log_with=read_trackers(""))
    with tracking(accelerator, tmp_path / "run", Example()):
        assert accelerator.trackers == []


def test_trackers_are_read_by_name(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard", "trackio"])
    assert read_trackers("tensorboard, trackio") == ["tensorboard", "trackio"]
    with pytest.raises(
        ValueError, match="tracker 'wandb' needs a package: pip install wandb, or run without it"
    ):
        read_trackers("tensorboard,wandb")
    with pytest.raises(ValueError, match="tracker 'wandbb' is unknown; did you mean 'wandb'"):
        read_trackers("wandbb")
