"""What a run of pretraining goes on with when it is resumed, and what it goes on without."""

import pickle
import shutil
import sys
from pathlib import Path

import pretrain
import pytest

from rope_mm.training.image_heads import IMAGE_HEADS

sys.path.insert(0, str(Path(__file__).parent))
from test_pretrain import same, train


def test_samples_that_fail_cost_no_step_and_are_made_when_it_is_resumed(data, tmp_path, monkeypatch):
    def full(teller, held_out, path):
        raise OSError("no space left")

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(data, whole, sample_every=2)
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(pretrain, "write_samples", full)
            train(data, parts, sample_every=2)
        assert [path.name for path in sorted((parts / "checkpoints").iterdir())] == ["step-000002"]
    train(data, parts, sample_every=2)
    for name in ("metrics.jsonl", "result.json"):
        assert (parts / name).read_text() == (whole / name).read_text()
    assert {path.name for path in (parts / "samples").iterdir()} == {
        path.name for path in (whole / "samples").iterdir()
    }


def test_a_run_goes_on_with_other_keys_that_no_result_depends_on_and_with_no_others(data, tmp_path):
    begun = {"log_every": 2, "sample_every": 3, "checkpoint_every": 2, "threads": 1, "data.strict": "true"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(data, whole, **begun)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-000004")
    for key, value in (("batch", 4), ("accumulate", 2), ("checkpointing", "true"), ("optim.lr", 1.0)):
        with pytest.raises(ValueError, match="another configuration"):
            train(data, parts, **begun, **{key: value})
    train(data, parts, log_every=1, sample_every=100, checkpoint_every=4, threads=0, workers=1)
    assert same(parts, whole)
    assert (parts / "run.yaml").read_text() == (whole / "run.yaml").read_text()


def test_what_prepares_batches_can_be_sent_to_workers_that_are_spawned(data, tmp_path, monkeypatch):
    readings = pretrain.PackedDocumentDataset.readings

    def sent(self, *range):
        return readings(pickle.loads(pickle.dumps(self)), *range)

    train(data, tmp_path / "whole")
    monkeypatch.setattr(pretrain.PackedDocumentDataset, "readings", sent)
    train(data, tmp_path / "run")
    assert same(tmp_path / "run", tmp_path / "whole")
    assert all(pickle.loads(pickle.dumps(head.times)) is head.times for head in IMAGE_HEADS.values())
