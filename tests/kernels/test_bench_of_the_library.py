"""The bench of what people wait for: its contenders do the same, and its table says what is missed."""

import library
import pytest
import torch

from rope_mm import place


def test_ours_and_theirs_place_images_alike():
    (case,) = library.placing(3)
    theirs, _ = case.theirs()
    assert torch.equal(case.ours()[0], theirs[:, 0].T.double())


def test_generated_tokens_are_those_of_the_unpatched_model():
    cases = list(library.generation(4, 2))
    assert [case.what for case in cases] == [
        "generate, set_rope of its own",
        "generate, rope-tv",
        "generate, use_kernels",
    ]
    for case in (cases[0], cases[2]):
        assert torch.equal(case.ours(), case.theirs())


@pytest.mark.filterwarnings("ignore")
def test_metrics_are_those_of_the_packages():
    cases = {case.other: case for case in library.metrics(60)}
    for package, name in (("prdc", "prdc"), ("torchmetrics", "kid")):
        pytest.importorskip(package)
        assert cases[package].what.startswith(name)
        assert cases[package].ours() == pytest.approx(cases[package].theirs(), rel=1e-6)


def test_a_video_that_is_placed_frame_by_frame_stops_where_the_whole_video_does():
    assert library.stream(5) == place("video:5x4x4", "rope-tv-causal")[1]


def test_a_row_has_the_ratio_of_each_round_and_a_missed_goal():
    now = [0.0]

    def take(seconds):
        now[0] += seconds

    case = library.Case("x", lambda: take(3.0), "y", lambda: take(2.0), 1.0)
    assert library.measure(case, 3, lambda: now[0]) == [
        "x",
        "3000",
        "y",
        "2000",
        "1.50 (1.50 to 1.50)",
        "<= 1.0, missed",
    ]
    assert library.measure(case._replace(goal=2.0), 3, lambda: now[0])[-1] == "<= 2.0"
    for seconds, said in ((4.0, "<= 2.0, <= 4 s"), (1.0, "<= 2.0, <= 1 s, missed")):
        bounded = case._replace(goal=2.0, seconds=seconds, rounds=2)
        assert library.measure(bounded, 3, lambda: now[0])[-1] == said
