"""Two steps of configs/adversarial/letters.yaml, with smaller batches and data."""

import json
from pathlib import Path

import adversarial

from rope_mm.data import captioned_letters
from rope_mm.evaluation.letters import train_letter_classifier
from rope_mm.training.config import load

CONFIG = Path(__file__).parents[2] / "configs" / "adversarial" / "letters.yaml"


def test_two_steps_of_letters_report_characters_and_styles_of_trained_and_held_out_combinations(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(captioned_letters, "__defaults__", (1, 1, 0))
    monkeypatch.setattr(train_letter_classifier, "__defaults__", (1,))
    flags = ["--config", CONFIG, "--output_dir", tmp_path, "--steps", "2", "--global_batch_size", "4"]
    flags += ["--eval_samples", "80", "--threads", "1"]
    adversarial.main(load(adversarial.Adversarial, [str(flag) for flag in flags]))
    metrics = json.loads((tmp_path / "result.json").read_text())
    names = {"accuracy", "character", "style", "character_held_out", "style_held_out", "frechet"}
    assert names <= set(metrics)
    assert {f"real_{name}" for name in names} <= set(metrics)
    assert (tmp_path / "samples" / "step-000002.png").exists()
