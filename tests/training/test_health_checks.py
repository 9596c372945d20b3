import pytest
import torch

from rope_mm.training.health_checks import finite, keep_batch, warning
from rope_mm.training.schedule import SCHEDULES


def evaluations(*coverage, name="coverage"):
    return [{"step": step, name: value, "frechet": 3.0} for step, value in enumerate(coverage)]


def scores(*pairs):
    return [
        {"step": step, "score/real": real, "score/fake": fake, "loss/critic": 0.7}
        for step, (real, fake) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    "healthy",
    [
        [],
        evaluations(0.9, 0.5),  # two readings are no trend
        evaluations(0.2, 0.8, 0.9, 0.7, 0.85),  # once
        evaluations(0.9, 0.85, 0.8),  # a little
        evaluations(0.9, 0.4, 0.3, 0.5),  # recovering
        scores((0.1, 0.0), (3.0, -3.0), (5.0, -5.0)),
        scores((21.0, -1.0), (21.0, -1.0), (21.5, -1.0)),  # far apart, but standing
        scores((15.0, 15.0), (18.0, 18.0)),
    ],
)
def test_a_healthy_run_is_not_warned_of(healthy):
    assert warning(healthy) is None


@pytest.mark.parametrize("name", ["coverage", "modes"])
def test_falling_coverage_is_warned_of_with_its_reading_and_the_cure(name):
    assert warning(evaluations(0.5, 0.92, 0.7, 0.55, name=name)) == (
        f"{name} fell to 0.55 from 0.92: the generator loses modes; raise the gammas of r1 and r2, or lower "
        "optim.lr"
    )


def test_diverging_scores_are_warned_of():
    said = warning(scores((0.1, 0.0), (5.0, -5.0), (9.0, -9.0), (20.0, -12.5)))
    assert said == (
        "the mean scores, 20 of real and -12.5 of generated images, diverge: the critic wins; raise the "
        "gammas of r1 and r2, or lower optim.critic_lr"
    )


def test_scores_that_drift_together_are_warned_of():
    assert "add centring: 0.01" in warning(scores((0.1, 0.0), (8.0, 7.0), (-40.0, -41.0)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_single_non_finite_number_is_detected(value):
    terms = {"critic": torch.tensor(0.7), "r1": torch.tensor(1.0)}
    assert finite(terms)
    assert not finite(terms | {"fake": torch.tensor(value)})


def test_a_saved_batch_is_read_back_and_no_temporary_file_remains(tmp_path):
    batch = {"real": torch.randn(2, 3)}
    keep_batch(tmp_path / "nan-step-7.pt", 7, {"critic": torch.tensor(float("nan"))}, [batch])
    kept = torch.load(tmp_path / "nan-step-7.pt")
    assert kept["step"] == 7 and torch.equal(kept["batches"][0]["real"], batch["real"])
    assert [path.name for path in tmp_path.iterdir()] == ["nan-step-7.pt"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_from_start_to_end_and_is_halfway_in_the_middle(name):
    schedule = SCHEDULES[name]
    assert [schedule(3.0, 1.0, part) for part in (0.0, 0.5, 1.0)] == pytest.approx([3.0, 2.0, 1.0])
    assert schedule(3.0, 3.0, 0.3) == 3.0
    early = 3.0 - schedule(3.0, 1.0, 0.25)
    assert early == pytest.approx({"linear": 0.5, "cosine": 1 - 0.5**0.5}[name])
