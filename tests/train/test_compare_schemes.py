"""The comparison of schemes on models of toy size: nothing is learned here, but everything else must work."""

import json
from dataclasses import replace
from pathlib import Path

import compare_schemes as compare
import pytest
import torch
from scipy.stats import tukey_hsd

from rope_mm import Scheme
from rope_mm.data.synthetic.qa_tasks import make_generation, make_motion, make_order, make_sprite
from rope_mm.data.synthetic.sprites import COLOURS, COLUMNS, MOTIONS, ROWS
from rope_mm.evaluation.qa import generate_answers, place_qa, score_answers
from rope_mm.evaluation.scheme_comparison import estimate_noise
from rope_mm.evaluation.sprites import classify_sprites, classify_videos
from rope_mm.training.config import load, run

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "compare").glob("*.yaml"))
SMALL = ROOT / "configs" / "compare" / "small.yaml"


TOY = """
steps: 3
global_batch_size: 8
documents: 40
eval_samples: 4
model: {patch_size: 8, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 1,
  num_key_value_heads: 1}
schemes: {flat: {scheme: flat}, tv: {scheme: rope-tv}}
trained:
  cell: {2x3: {rows: 2, columns: 3, cell: 8}}
  neighbour: {2 of 1x1: {size: 8}}
  needle: {3 of 1x1: {ask: frame, frames: 3, size: 8}}
  sprite: {1x1: {size: 8}}
  motion: {2 of 1x1: {frames: 2, size: 8}}
  order: {2 of 1x1: {images: 2, size: 8}}
  generation: {1x2: {size: [8, 16]}}
untrained: {cell: {3x2: {rows: 3, columns: 2, cell: 8}}, frame: {2 of 1x2: {frames: 2, size: [8, 16]}}}
"""


@pytest.fixture
def toy(tmp_path):
    """Flags of a comparison of two schemes and one seed."""
    (tmp_path / "toy.yaml").write_text(TOY)
    return ["--config", str(tmp_path / "toy.yaml"), "--seeds", "1", "--output_dir", str(tmp_path / "out")]


def start(flags):
    config = load(compare.CompareSchemes, flags)
    compare.main(config)
    return Path(config.output_dir)


def test_a_comparison_leaves_a_table_a_figure_and_all_numbers(toy):
    out = start(toy)
    report = json.loads((out / "compare.json").read_text())
    assert set(report["runs"]) == {"flat", "tv"}
    (run,) = report["runs"]["flat"]
    tasks = {"cell", "neighbour", "needle", "sprite", "motion", "order", "generation"}
    assert set(run["metrics"]["trained"]) == tasks
    assert set(run["metrics"]["untrained"]) == {"cell", "frame"}
    assert run["parameters"] == report["runs"]["tv"][0]["parameters"]
    summary = report["summary"]["trained"]["all"]
    marks = [sum(forms.values()) / len(forms) for forms in run["metrics"]["trained"].values()]
    assert summary["mean"]["flat"] == pytest.approx(sum(marks) / len(tasks))
    table = (out / "table.md").read_text()
    assert table.count("| flat |") == table.count("| tv |") == 2
    assert (out / "compare.png").stat().st_size < 200_000
    page = (out / "index.html").read_text()
    assert page.count("<td>flat</td>") == page.count("<td>tv</td>") == 2
    assert page.count("data:image/png") == 1 and "<svg" in page
    assert [point[0] for point in run["losses"]["text"]] == [3]


@pytest.mark.slow
def test_finished_runs_are_not_repeated_and_more_seeds_are_added(toy, monkeypatch):
    for name in ("draw_figure", "write_comparison_page"):
        monkeypatch.setattr(compare, name, lambda *args, **options: None)
    out = start(toy)
    files = [path for path in out.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    trained, train = [], compare.train
    monkeypatch.setattr(compare, "train", lambda *args: trained.append(args[2:4]) or train(*args))
    start(toy)
    assert not trained
    assert {path: path.read_bytes() for path in files} == before
    start(["2" if given == "--seeds" else word for given, word in zip(["", *toy], toy, strict=False)])
    assert trained == [("flat", 1), ("tv", 1)]
    first = out / "runs" / "tv-0.json"
    first.unlink()
    start(toy)
    assert trained[2:] == [("tv", 0)]
    assert json.loads(first.read_text())["metrics"] == json.loads(before[first])["metrics"]


def test_a_folder_of_other_runs_is_refused(toy):
    start(toy)
    with pytest.raises(ValueError, match="another lr"):
        start([*toy, "--lr", "0.5"])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "two or more"),
        (["--config", str(SMALL), "--steps", "0"], "steps must be at least 1"),
        (["--config", str(SMALL), "--trained.room.small.rows", "2"], "question 'room' is unknown"),
        (["--config", str(SMALL), "--trained.cell.small.row", "2"], "task 'cell'"),
        (["--config", str(SMALL), "--schemes.flat.scheme", "flatt"], "flatt"),
        (["--config", str(SMALL), "--augment.other.rescale", "2"], "augment names ['other']"),
        (["--config", str(SMALL), "--baselines.other", "alibi"], "baselines names ['other']"),
        (["--config", str(SMALL), "--baselines.flat", "alibbi"], "baseline 'alibbi' is unknown"),
    ],
)
def test_invalid_input_is_refused_in_one_line(flags, reason, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(
            compare.main,
            compare.CompareSchemes,
            [*flags, "--output_dir", str(tmp_path), "--documents", "8", "--eval_samples", "1"],
        )
    assert reason in capsys.readouterr().err


def test_each_document_of_a_step_is_moved_by_itself_and_keeps_its_tokens(toy):
    benchmark = compare.Benchmark(load(compare.CompareSchemes, toy))
    placed = place_qa(benchmark.train_set(0)[:6], benchmark.tokenizer, Scheme(layout="rope-tv"))
    moved = compare.move_positions(placed, {"rescale": 2.0}, torch.Generator().manual_seed(0))
    factors = {
        round((new.row.positions[-1, 0] / old.row.positions[-1, 0]).item(), 6)
        for new, old in zip(moved, placed, strict=True)
    }
    assert len(factors) == 6 and all(0.5 <= factor <= 2 for factor in factors)
    assert all(new.row.input_ids is old.row.input_ids for new, old in zip(moved, placed, strict=True))
    again = compare.move_positions(placed, {"rescale": 2.0}, torch.Generator().manual_seed(0))
    assert all(torch.equal(a.row.positions, b.row.positions) for a, b in zip(moved, again, strict=True))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_models_of_a_comparison_differ_in_nothing_but_the_scheme(path):
    config = load(
        compare.CompareSchemes,
        [
            "--config",
            str(SMALL),
            "--config",
            str(path),
            "--documents",
            "8",
            "--eval_samples",
            "2",
            "--device",
            "cpu",
        ],
    )
    tokenizer = compare.Benchmark(config).tokenizer
    models = {scheme: compare.make_model(config, tokenizer, scheme, 0) for scheme in config.schemes}
    first = dict(models["flat"].named_parameters())
    for name, model in models.items():
        ours = {key: weight for key, weight in model.named_parameters() if "rotary" not in key}
        assert ours.keys() == first.keys()
        assert all(torch.equal(weight, first[key]) for key, weight in ours.items()), name
        assert model.config.scheme.theta == config.theta
    assert {"m-rope-spatial-reset", "videorope", "mixed"} < models.keys()


def test_the_theta_of_all_goes_to_the_schemes_that_read_one(toy):
    schemes = {"tv": {"scheme": "rope-tv"}, "log": {"scheme": "ltx"}}
    schemes["own"] = {"scheme": "rope-tv", "theta": 7.0}
    config = replace(load(compare.CompareSchemes, toy), schemes=schemes, theta=50.0)
    tokenizer = compare.Benchmark(config).tokenizer
    thetas = [compare.make_model(config, tokenizer, name, 0).config.scheme.theta for name in schemes]
    assert thetas == [50.0, Scheme.theta, 7.0]


@pytest.fixture
def asked(toy):
    """A model and, of each task, quizzes at their places."""
    config = load(compare.CompareSchemes, toy)
    benchmark = compare.Benchmark(config)
    model = compare.make_model(config, benchmark.tokenizer, "tv", 0).eval()
    told = {task: told for (kind, task, _), told in benchmark.questions.items() if kind == "trained"}
    return model, {
        task: place_qa(quizzes, benchmark.tokenizer, model.config.scheme) for task, quizzes in told.items()
    }


def clairvoyant(model, asked):
    """A model that knows what comes next, and what is to be drawn."""
    forward = type(model).forward
    ids = [row.input_ids.clone() for row, _ in asked]
    patches = torch.cat([quiz.patches for _, quiz in asked]).float() / 127.5 - 1

    @torch.no_grad()
    def answer(**inputs):
        out = forward(model, **inputs)
        for row, words in zip(out.logits, ids, strict=True):
            row[: len(words) - 1] = torch.nn.functional.one_hot(words[1:], row.shape[-1]).float()
        out.patches = patches
        return out

    model.forward = answer


def test_an_answer_is_right_if_and_only_if_greedy_decoding_writes_it(asked):
    model, tasks = asked
    one = tasks["sprite"][:1]
    found = generate_answers(model, one)
    assert not found.correct and found.text_loss > 0 and found.image_loss == 0
    clairvoyant(model, one)
    assert score_answers(model, one).all()
    assert one[0].row.input_ids[-1] == 1
    one[0].row.input_ids[-1] = 5  # it goes on where the end was
    clairvoyant(model, one)
    one[0].row.input_ids[-1] = 1
    assert not score_answers(model, one).any()


@torch.no_grad()
def test_a_generated_image_is_right_if_it_shows_the_requested_square_whatever_else_is_in_the_batch(asked):
    model, tasks = asked
    drawings, mixed = tasks["generation"], [*tasks["generation"], *tasks["cell"]]
    found = generate_answers(model, mixed)
    assert (
        found.image_loss > 0 and len(found.patches) == sum(quiz.answer_patches for _, quiz in drawings) == 8
    )
    assert generate_answers(model, drawings).text_loss == 0
    torch.testing.assert_close(generate_answers(model, drawings).image_loss, found.image_loss)
    assert not score_answers(model, drawings).all()
    clairvoyant(model, drawings)
    assert score_answers(model, drawings).all() and generate_answers(model, drawings).image_loss == 0
    clairvoyant(model, drawings[1:] + drawings[:1])  # the right pictures, each for another one
    shown = [quiz.patches for _, quiz in drawings]
    same = [torch.equal(one, other) for one, other in zip(shown, shown[1:] + shown[:1], strict=True)]
    assert score_answers(model, drawings).tolist() == same and not all(same)


def test_the_model_never_sees_the_image_that_it_has_to_generate(asked):
    model, tasks = asked
    one = tasks["generation"][:1]
    before = generate_answers(model, one).patches
    one[0].sample.patches.zero_()
    assert torch.equal(generate_answers(model, one).patches, before)


def one_of(image):
    """A batch of one image or video."""
    return image[None]


def test_captions_agree_with_the_classification_of_sprites():
    for number in range(20):
        quiz = make_sprite(torch.Generator().manual_seed(number), 16)
        seen = {name: int(index) for name, index in classify_sprites(one_of(quiz.document[0])).items()}
        assert (
            quiz.answer
            == f"{list(COLOURS)[seen['colour']]} at the {ROWS[seen['row']]} {COLUMNS[seen['column']]}"
        )
        for size in (16, (8, 16), (8, 48), (32, 32)):
            quiz = make_generation(torch.Generator().manual_seed(number), size)
            seen = {name: int(index) for name, index in classify_sprites(one_of(quiz.answer)).items()}
            told = f"{list(COLOURS)[seen['colour']]} at the {ROWS[seen['row']]} {COLUMNS[seen['column']]}"
            assert quiz.question == f"generate {told}"
        quiz = make_motion(torch.Generator().manual_seed(number), 4, 16)
        assert list(MOTIONS)[classify_videos(one_of(quiz.document[0]))["motion"]] in quiz.answer


def test_the_image_with_the_requested_number_has_the_colour_of_the_answer():
    for number in range(20):
        quiz = make_order(torch.Generator().manual_seed(number), images=4, words=2)
        pictures = torch.stack([part for part in quiz.document if not isinstance(part, str)])
        colours = [list(COLOURS)[index] for index in classify_sprites(pictures)["colour"]]
        assert colours[int(quiz.question.split()[-1][:-1]) - 1] == quiz.answer
        assert all(len(part.split()) == 2 for part in quiz.document if isinstance(part, str))


def test_noise_is_tukeys_difference_when_seeds_have_no_effect_and_p_is_the_share_of_shuffles():
    torch.manual_seed(0)
    scores = torch.randn(4, 60, dtype=torch.float64) * 0.1
    scores -= scores.mean(0)  # no effect of seeds is left to take away
    scores[0] += 0.02
    ours = estimate_noise(scores)["differ"]
    interval = tukey_hsd(*scores.tolist()).confidence_interval(0.95)
    theirs = float((interval.high - interval.low)[0, 1] / 2)
    assert ours == pytest.approx(theirs * (236 / 177) ** 0.5, rel=0.02)  # 177 degrees of freedom, not 236


def test_three_seeds_of_two_schemes_are_too_few_for_a_significant_p():
    apart = estimate_noise(torch.tensor([[0.0, 0.01, 0.02], [0.9, 0.91, 0.92]]))
    assert apart["p"] == pytest.approx(0.25, abs=0.02)  # 2 of 8 shuffles are as extreme
    assert apart["differ"] == pytest.approx(0.0, abs=1e-6)
    assert estimate_noise(torch.rand(3, 1))["differ"] is None


@pytest.mark.slow
def test_schemes_that_do_not_differ_give_any_p_with_equal_chance():
    torch.manual_seed(1)
    p = torch.tensor([estimate_noise(torch.rand(4, 3))["p"] for _ in range(30)])
    assert 0.3 < p.mean() < 0.7 and p.min() > 1e-4
