"""FSDP2 on CPUs: sharded weights train as whole ones, and resume on any number of processes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from torch.distributed.fsdp import StateDictType

from rope_mm.training.run_dir import WEIGHTS, check_weights

SCRIPT = Path(__file__).parent / "fsdp_on_cpus.py"
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "RopeMMBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones_and_are_saved_on_two_processes_and_resumed_on_one_and_back(
    pretrain, runs, check_close, refusal, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"image_head": "flow", "steps": 4, "optim.lr": 1e-3, "global_batch_size": 7}
    pretrain.train(whole, **settings)
    with monkeypatch.context() as patch:
        for name, value in FSDP.items():
            patch.setenv(name, value)
        pretrain.torchrun(parts, script=[str(SCRIPT)], **settings)
        check_close(parts, whole)
        stored = parts / "checkpoints" / "step-000002" / "pytorch_model_fsdp_0"
        assert {path.name for path in stored.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
        runs.forget(parts, 2)
        pretrain.torchrun(parts, script=[str(SCRIPT)], processes=1, checkpoint_every=1, **settings)
        check_close(parts, whole)
        runs.forget(parts, 3)
        pretrain.torchrun(parts, script=[str(SCRIPT)], **settings)
        check_close(parts, whole)
    runs.forget(parts, 3)
    message = refusal(pretrain, parts, **settings)
    assert "has weights that are stored sharded, and this command reads whole ones" in message


@pytest.mark.parametrize("stored", WEIGHTS)
@pytest.mark.parametrize("own", WEIGHTS)
def test_a_checkpoint_is_refused_by_a_command_that_stores_weights_in_another_way(stored, own, tmp_path):
    (tmp_path / WEIGHTS[stored]).mkdir()
    kinds = {"sharded": StateDictType.SHARDED_STATE_DICT, "gathered by FSDP": StateDictType.FULL_STATE_DICT}
    plugin = SimpleNamespace(state_dict_type=kinds.get(own))
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP if own in kinds else DistributedType.NO,
        state=SimpleNamespace(fsdp_plugin=plugin),
    )
    if stored == own:
        check_weights(tmp_path, accelerator)
        return
    with pytest.raises(ValueError, match=f"are stored {stored}, and this command reads {own} ones"):
        check_weights(tmp_path, accelerator)
