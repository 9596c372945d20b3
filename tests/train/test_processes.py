"""Pretraining in micro-batches, in several processes and in other precisions is the same training."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.state import AcceleratorState

from rope_mm.models import modeling_rope_mm
from rope_mm.training.image_heads import IMAGE_HEADS

ROOT = Path(__file__).parents[2]
SEVEN = {
    "global_batch_size": 7,
    "optim.lr": 1e-3,
}  # which two processes and three micro-batches do not divide
CRITIC = {"image_head": "adversarial", "optim.critic_lr": 1e-3}


@pytest.mark.slow  # without a critic: the next test, and tests/train/test_sharded.py
def test_two_processes_train_as_one_on_the_same_documents_and_resume_bit_exactly(
    pretrain, runs, check_close, tmp_path
):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {"steps": 4, "checkpoint_every": 2, **SEVEN, **CRITIC}
    pretrain.train(one, **settings)
    pretrain.torchrun(two, **settings)
    check_close(two, one)
    shutil.copytree(two / "model", tmp_path / "before" / "model")
    runs.forget(two, 2)
    pretrain.torchrun(two, **settings)
    assert runs.same(two, tmp_path / "before")


@pytest.mark.slow
def test_two_processes_train_groups_of_one_text_as_one_process_does(
    pretrain, head_flags, check_close, tmp_path
):
    settings = head_flags("wflow") | {"data.group_size": 3, "steps": 3, "optim.lr": 1e-3}
    pretrain.train(tmp_path / "one", **settings)
    pretrain.torchrun(tmp_path / "two", **settings)
    check_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_stream_resumes_on_another_number_of_processes(pretrain, runs, check_close, tmp_path):
    one, parts = tmp_path / "one", tmp_path / "parts"
    stream = {"data.streaming": "true", "data.shuffle": 5, "eval_samples": 3}
    settings = {"image_head": "flow", "steps": 6, "checkpoint_every": 2, **SEVEN, **stream}
    pretrain.train(one, **settings)
    pretrain.torchrun(parts, num_workers=2, **settings)
    check_close(parts, one)
    runs.forget(parts, 4)
    pretrain.train(parts, **settings)
    check_close(parts, one)
    runs.forget(parts, 4)
    pretrain.torchrun(parts, **settings)
    check_close(parts, one)


@pytest.mark.parametrize("head", IMAGE_HEADS)
def test_three_micro_batches_give_the_same_step_as_the_whole_batch(
    head, pretrain, head_flags, check_close, tmp_path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"steps": 2, **SEVEN, **head_flags(head), **(CRITIC if head == "adversarial" else {})}
    pretrain.train(whole, **settings)
    pretrain.train(parts, gradient_accumulation_steps=3, **settings)
    check_close(parts, whole)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(pretrain, check_close, tmp_path):
    pretrain.train(tmp_path / "kept", image_head="adversarial", steps=1)
    pretrain.train(tmp_path / "anew", image_head="adversarial", steps=1, gradient_checkpointing="true")
    check_close(tmp_path / "anew", tmp_path / "kept")


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own look, at a graph break
def test_a_compiled_run_is_the_same_run(pretrain, check_close, tmp_path):
    pretrain.train(tmp_path / "eager", image_head="flow", steps=1)
    pretrain.train(tmp_path / "compiled", image_head="flow", steps=1, compile="aot_eager")
    check_close(tmp_path / "compiled", tmp_path / "eager")


def test_what_a_compiled_critic_cannot_do_is_refused_before_the_folder_is_touched(
    pretrain, refusal, tmp_path
):
    settings = {"image_head": "adversarial", "compile": "eager", "loss.method": "autograd"}
    message = refusal(pretrain, tmp_path / "run", **settings)
    assert re.search(r"compiled or sharded .* use fd", message)
    assert not (tmp_path / "run" / "run.yaml").exists()


@pytest.mark.slow
def test_eager_attention_trains_as_sdpa_does(pretrain, runs, tmp_path, monkeypatch):
    eager, calls = modeling_rope_mm.eager_attention, []
    monkeypatch.setattr(
        modeling_rope_mm, "eager_attention", lambda *args, **how: calls.append(1) or eager(*args, **how)
    )
    sdpa, its = tmp_path / "sdpa", tmp_path / "eager"
    pretrain.train(sdpa, image_head="adversarial", steps=2)
    assert not calls
    pretrain.train(its, image_head="adversarial", steps=2, attn_implementation="eager")
    assert calls
    for mine, other in zip(runs.lines(its), runs.lines(sdpa), strict=True):
        assert mine == pytest.approx(other, abs=1e-4, rel=1e-4)


@pytest.fixture
def bf16(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()  # a process has one state, and it is that of earlier tests
    yield
    AcceleratorState._reset_state()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's norm under autocast
def test_bf16_is_near_float32_and_keeps_weights_and_penalties_in_it(pretrain, runs, tmp_path, request):
    pretrain.train(tmp_path / "full", image_head="adversarial", steps=1)
    request.getfixturevalue("bf16")
    pretrain.train(tmp_path / "half", image_head="adversarial", steps=1)
    assert all(weight.dtype == torch.float32 for weight in runs.weights(tmp_path / "half").values())
    first, its = runs.lines(tmp_path / "half")[0], runs.lines(tmp_path / "full")[0]
    assert first == pytest.approx(its, rel=2e-2, abs=2e-2)
    assert first["loss/text"] != its["loss/text"]
    pretrain.train(tmp_path / "flag", image_head="adversarial", steps=1, mixed_precision="bf16")
    assert runs.same(tmp_path / "flag", tmp_path / "half")
    # at the same weights, of the same images but for their rounding
    assert first["penalty/r1"] == pytest.approx(its["penalty/r1"], rel=1e-5)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_accelerate_config_begins_with_its_command_and_loads(path):
    begun = f"# accelerate launch --config_file configs/accelerate/{path.name} train/pretrain.py --config "
    command = path.read_text().splitlines()[0]
    assert command.startswith(begun)
    assert (ROOT / command.split()[-1]).is_file()
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert re.search("bf16", path.name) is None or config.mixed_precision == "bf16"
    assert config.use_cpu == (path.name == "cpu.yaml")


@pytest.mark.slow
def test_the_accelerate_command_starts_in_the_environment_that_make_makes(accelerate_command, runs):
    _, *words = (ROOT / "configs" / "accelerate" / "cpu.yaml").read_text().splitlines()[0][2:].split()
    done = subprocess.run(
        [accelerate_command, *words, "--dry-run"],
        cwd=ROOT,
        env=runs.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-6000:]}"
    assert done.stdout.startswith("output_dir: runs/tiny")
