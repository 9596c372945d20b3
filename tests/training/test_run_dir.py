import re

import pytest
from accelerate import Accelerator

from rope_mm.files import write_text
from rope_mm.training.run_dir import Identity, open_folder


def open_(out, config="seed: 2\n", restart=False):
    open_folder(out, Identity(config, {}), Accelerator(cpu=True), restart)


def content(out):
    return {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["model/a.txt", "samples/a.txt", "checkpoints/step-000001/a", "result.json"])
def test_files_that_belong_to_no_run_are_not_deleted(name, tmp_path):
    write_text(tmp_path / name, "mine")
    with pytest.raises(ValueError, match=r"holds (\w|\.)+, but no run.yaml to resume from; .* --restart"):
        open_(tmp_path)
    assert content(tmp_path) == {name: "mine"}


def test_a_finished_run_keeps_its_model_without_its_checkpoints(tmp_path):
    open_(tmp_path)
    for name in ("samples/step-000002.png", "model/config.json", "result.json"):
        write_text(tmp_path / name, "made")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"holds model, result.json, but no checkpoint to resume from"):
        open_(tmp_path)
    with pytest.raises(ValueError, match=r"another configuration \('seed: 2' there, 'seed: 3' here\)"):
        open_(tmp_path, "seed: 3\n")
    assert content(tmp_path) == before
    open_(tmp_path, restart=True)
    assert content(tmp_path).keys() == {"run.yaml", "data.json", "versions.json"}


def test_a_run_interrupted_before_its_first_checkpoint_starts_again_and_deletes_nothing(tmp_path):
    for _ in range(2):
        open_(tmp_path)
        for name in ("samples/step-000001.png", "metrics.jsonl", "notes.txt"):
            write_text(tmp_path / name, "made")
    assert len(content(tmp_path)) == 6


def test_all_keys_that_differ_are_named_but_not_those_that_may(tmp_path):
    accelerator = Accelerator(cpu=True)
    there = "steps: 30\neval_samples: 50\ndata:\n  size: 8\n  path: a\n"
    here = "steps: 40\neval_samples: 100\ndata:\n  size: 8\n  path: b\nema: 1\n"
    open_(tmp_path, there)
    write_text(tmp_path / "checkpoints/step-000030/a", "made")
    rest = (
        "'eval_samples: 50' there, 'eval_samples: 100' here; 'data.path: a' there, 'data.path: b' here; "
        "'no ema' there, 'ema: 1' here"
    )
    for extend, steps in ((True, ""), (False, "'steps: 30' there, 'steps: 40' here; ")):
        said = f"another configuration ({steps}{rest}); choose"
        with pytest.raises(ValueError, match=re.escape(said)):
            open_folder(tmp_path, Identity(here, {}), accelerator, extend=extend)


def test_a_run_without_a_checkpoint_starts_on_repaired_data_and_with_another_configuration(tmp_path):
    accelerator = Accelerator(cpu=True)
    data = [{"train": {"rows": rows, "digest": str(rows)}} for rows in (7, 8)]
    open_folder(tmp_path, Identity("seed: 2\n", data[0]), accelerator)
    open_folder(tmp_path, Identity("seed: 3\n", data[1]), accelerator)
    assert '"rows": 8' in content(tmp_path)["data.json"] and content(tmp_path)["run.yaml"] == "seed: 3\n"
    write_text(tmp_path / "checkpoints/step-000001/a", "made")
    said = "other data (train: 8 rows, of content 8 there, train: 7 rows, of content 7 here)"
    with pytest.raises(ValueError, match=re.escape(said)):
        open_folder(tmp_path, Identity("seed: 3\n", data[0]), accelerator)


def test_the_refusal_of_changed_data_names_only_the_splits_that_changed(tmp_path):
    train = {"rows": 9, "digest": "same"}
    old, new = ({"train": train, "held_out": {"rows": 2, "digest": text}} for text in ("old", "new"))
    open_folder(tmp_path, Identity("seed: 2\n", old), Accelerator(cpu=True))
    write_text(tmp_path / "checkpoints/step-000001/a", "made")
    said = "(held_out: 2 rows, of content old there, held_out: 2 rows, of content new here)"
    with pytest.raises(ValueError, match=re.escape(said)):
        open_folder(tmp_path, Identity("seed: 2\n", new), Accelerator(cpu=True))
