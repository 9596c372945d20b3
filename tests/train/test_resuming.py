"""What a run of pretraining may change when it is resumed."""

import pickle
import shutil

import pytest

from rope_mm.training.image_heads import IMAGE_HEADS


def test_a_failure_while_sampling_loses_no_step_and_the_resumed_run_samples_again(
    pretrain, tmp_path, monkeypatch
):
    def full(pipeline, held_out, path):
        raise OSError("no space left")

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain.train(whole, sample_every=2)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain.module, "write_samples", full)
            with pytest.raises(OSError, match="no space left"):
                pretrain.train(parts, sample_every=2)
        assert [path.name for path in sorted((parts / "checkpoints").iterdir())] == ["step-000002"]
    pretrain.train(parts, sample_every=2)
    for name in ("metrics.jsonl", "result.json"):
        assert (parts / name).read_text() == (whole / name).read_text()
    assert {path.name for path in (parts / "samples").iterdir()} == {
        path.name for path in (whole / "samples").iterdir()
    }


@pytest.mark.slow
def test_a_run_resumes_with_other_keys_on_which_no_result_depends_and_with_no_others(
    pretrain, runs, tmp_path
):
    begun = {"log_every": 2, "sample_every": 3, "checkpoint_every": 2, "threads": 1, "data.strict": "true"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain.train(whole, **begun)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-000004")
    for key, value in (("global_batch_size", 4), ("gradient_accumulation_steps", 2), ("optim.lr", 1.0)):
        with pytest.raises(ValueError, match="another configuration"):
            pretrain.train(parts, **begun, **{key: value})
    pretrain.train(parts, log_every=1, sample_every=100, checkpoint_every=4, threads=0, num_workers=1)
    assert runs.same(parts, whole)
    assert (parts / "run.yaml").read_text() == (whole / "run.yaml").read_text()


def test_the_dataset_can_be_pickled_for_spawned_workers(pretrain, runs, tmp_path, monkeypatch):
    make_loader = pretrain.module.PackedDocumentDataset.make_loader

    def sent(self, *steps):
        return make_loader(pickle.loads(pickle.dumps(self)), *steps)

    pretrain.train(tmp_path / "whole", steps=2)
    monkeypatch.setattr(pretrain.module.PackedDocumentDataset, "make_loader", sent)
    pretrain.train(tmp_path / "run", steps=2)
    assert runs.same(tmp_path / "run", tmp_path / "whole")
    assert all(
        pickle.loads(pickle.dumps(head.sample_time)) is head.sample_time for head in IMAGE_HEADS.values()
    )
