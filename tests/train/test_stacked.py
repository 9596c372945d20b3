"""Two steps of every configuration of stacked digits, with smaller batches and data."""

import json
from pathlib import Path

import adversarial
import numpy
import pytest

from rope_mm.data import EMBEDDED, stack_digits
from rope_mm.data.synthetic.stacked import stacked_digits
from rope_mm.training.config import load

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "adversarial"


@pytest.fixture
def two_steps(tmp_path, monkeypatch):
    """The metrics of two small steps of a configuration."""
    monkeypatch.setattr(stack_digits, "__defaults__", (400, 60))
    monkeypatch.setitem(
        EMBEDDED, "stacked-digits", stacked_digits
    )  # kept rows would be few for all later tests

    def run(config, **changes):
        out = tmp_path / "run"
        settings = {
            "config": CONFIGS / config, "output_dir": out, "steps": 2, "global_batch_size": 2,
            "eval_samples": 60, "threads": 1, **changes,
        }  # fmt: skip
        flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        adversarial.main(load(adversarial.Adversarial, flags))
        return json.loads((out / "result.json").read_text()), out / "samples" / "step-000002.png"

    return run


def test_without_captions_modes_are_counted(two_steps):
    metrics, sheet = two_steps("stacked-digits.yaml")
    assert set(metrics) == {
        "samples", "modes", "modes_covered", "kl", "kl_excess",
        "real_modes", "real_modes_covered", "real_kl", "real_accuracy",
    }  # fmt: skip
    assert 1 <= metrics["modes"] <= 60
    assert sheet.exists()


@pytest.mark.parametrize("caption", ["number", "caption"])
def test_with_captions_the_accuracy_of_digits_is_measured_too(caption, two_steps):
    metrics, _ = two_steps("stacked-digits-captioned.yaml", **{"data.caption": caption})
    assert {"modes", "accuracy"} < set(metrics)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_metrics(two_steps):
    one, _ = two_steps("stacked-digits.yaml")
    two, _ = two_steps("stacked-digits.yaml", restart="true")
    assert one == two


@pytest.mark.parametrize("captioned", [False, True])
def test_stacked_mnist_trains_from_an_npz_file(captioned, two_steps, tmp_path):
    labels = numpy.arange(200) // 10 % 10  # so that of each digit some are held out and some are not
    image = numpy.random.default_rng(0).integers(0, 255, (200, 28, 28), dtype="uint8")
    numpy.savez(tmp_path / "mnist.npz", image=image, label=labels)
    changes = {"data.caption": "number", "evaluator": "captioned-modes"} if captioned else {}
    metrics, _ = two_steps("stacked-mnist.yaml", **{"data.path": f"stacked:{tmp_path}/mnist.npz"}, **changes)
    assert set(metrics) >= {"modes", "kl_excess", "real_kl"}
    assert ("accuracy" in metrics) == captioned
