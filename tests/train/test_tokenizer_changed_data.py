"""A run with a tokenizer of words whose data changes: the vocabulary is that of its beginning."""

import shutil

import pytest
from datasets import Dataset, Features, Image, Value


def write_rows(bars, path, tmp_path, caption):
    """The bars with captions by their number; the last row is one more of the same."""
    rows = Dataset.from_parquet(str(bars), cache_dir=tmp_path / "cache").to_list()
    kept = [{"image": row["image"], "caption": caption(number)} for number, row in enumerate(rows)]
    Dataset.from_list(kept, features=Features(image=Image(), caption=Value("string"))).to_parquet(path)


@pytest.mark.parametrize("script", ["adversarial", "pretrain"])
def test_a_run_goes_on_with_changed_captions_of_its_words_and_is_refused_new_words(
    script, request, refusal, bars, tmp_path
):
    toy, data, output_dir = request.getfixturevalue(script), tmp_path / "data.parquet", tmp_path / "run"
    settings = {"tokenizer": "words", "steps": 1, "checkpoint_every": 1}
    if script == "pretrain":
        settings |= {"data.paths": f"[{data}]", "data.templates": "['{caption}{image:generate}']"}
        settings["optim.final_lr_ratio"] = 1.0
    else:
        settings |= {"data.path": data, "data.size": 4, "optim.final_lr_ratio": 1.0}
    write_rows(bars, data, tmp_path, lambda number: f"red bar {'abcd'[number % 4]}")
    toy.train(output_dir, **settings)
    longer = settings | {"steps": 2, "data.changed": "true"}
    write_rows(bars, data, tmp_path, lambda number: "scarlet bar" if number == 5 else "red bar")
    said = refusal(toy, output_dir, **longer)
    assert f"the run in {output_dir} began without 'scarlet' in 'scarlet bar'" in said
    assert "--restart" in said
    write_rows(bars, data, tmp_path, lambda number: "red bar")  # fewer words than before
    shutil.rmtree(output_dir / "model")
    toy.train(output_dir, **longer)
    write_rows(bars, data, tmp_path, lambda number: "scarlet bar")
    toy.train(output_dir, **settings, restart="true")


def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(adversarial, refusal, bars, tmp_path):
    data, output_dir = tmp_path / "data.parquet", tmp_path / "run"
    settings = {"tokenizer": "words", "checkpoint_every": 1, "data.path": data, "data.size": 4}
    settings |= {"optim.final_lr_ratio": 1.0, "data.changed": "true"}
    write_rows(bars, data, tmp_path, lambda number: "a bar")
    adversarial.train(output_dir, steps=1, **settings)
    write_rows(bars, data, tmp_path, lambda number: "another bar of four")
    for name in ("tokenizer", "model"):  # as of a run of an earlier version that was stopped
        shutil.rmtree(output_dir / name)
    said = refusal(adversarial, output_dir, steps=2, **settings)
    assert "does not fit this model (" in said and "start anew with --restart" in said
