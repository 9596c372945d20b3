"""Pretraining in parts, in processes and in other precisions is the same training."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.state import AcceleratorState

from rope_mm.models import modeling_rope_mm
from rope_mm.training.image_heads import IMAGE_HEADS

sys.path.insert(0, str(Path(__file__).parent))
from test_pretrain import ROOT, environment, flags, lines, same, train, weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
MADE = (Path(sys.prefix) / "installed").exists()  # the environment is that of `make`
SLOWLY = {"optim.lr": 1e-3, "optim.critic_lr": 1e-3}


def launch(data, out, **changes):
    """The same training in two processes."""
    words = [*TORCHRUN, str(ROOT / "train" / "pretrain.py"), *flags(data, out, **changes)]
    env = environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-6000:]}"


def close(one, two, within=1e-5):
    ours, theirs = weights(one), weights(two)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=within, rtol=0, msg=name)
    for mine, its in zip(lines(one), lines(two), strict=True):
        assert mine == pytest.approx(its, abs=within, rel=within)


def forget(out, step):
    """Leave the run as it was at a step."""
    for path in (out / "checkpoints").iterdir():
        if path.name > f"step-{step:06d}":
            shutil.rmtree(path)
    shutil.rmtree(out / "model")


@pytest.mark.slow
@pytest.mark.parametrize(("head", "steps"), [("flow", 20), ("adversarial", 4)])
def test_two_processes_are_one_with_the_same_documents(head, steps, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {"head": head, "batch": 7, "steps": steps, "checkpoint_every": 2, **SLOWLY}
    train(data, one, **settings)
    launch(data, two, **settings)
    close(two, one)
    if head == "adversarial":  # and they resume to the bit
        shutil.copytree(two / "model", tmp_path / "before" / "model")
        forget(two, 2)
        launch(data, two, **settings)
        assert same(two, tmp_path / "before")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(data, tmp_path):
    one, parts = tmp_path / "one", tmp_path / "parts"
    settings = {"head": "flow", "batch": 7, "steps": 6, "checkpoint_every": 2, **SLOWLY}
    train(data, one, **settings)
    launch(data, parts, **settings)
    forget(parts, 4)
    train(data, parts, **settings)
    close(parts, one)
    forget(parts, 4)
    launch(data, parts, **settings)
    close(parts, one)


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_stream_and_resume(data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    stream = {"data.streaming": "true", "data.shuffle": 5, "data.held_out": 3}
    settings = {"head": "flow", "batch": 7, "steps": 6, "checkpoint_every": 2, **SLOWLY, **stream}
    train(data, one, **settings)
    launch(data, two, **settings)
    close(two, one)
    shutil.copytree(two / "model", tmp_path / "before" / "model")
    forget(two, 4)
    launch(data, two, **settings)
    assert same(two, tmp_path / "before")
    forget(two, 4)
    train(data, two, **settings)
    close(two, one)


@pytest.mark.parametrize("head", IMAGE_HEADS)
def test_a_batch_read_in_parts_is_the_same_batch(head, data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"head": head, "batch": 7, "steps": 3, **SLOWLY}
    train(data, whole, **settings)
    train(data, parts, accumulate=3, **settings)
    close(parts, whole)


@pytest.mark.parametrize("head", ["flow", "adversarial"])
def test_blocks_computed_anew_change_nothing(head, data, tmp_path):
    train(data, tmp_path / "kept", head=head, steps=2)
    train(data, tmp_path / "anew", head=head, steps=2, checkpointing="true")
    close(tmp_path / "anew", tmp_path / "kept")


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own look, at a graph break
def test_a_compiled_run_is_the_same_run(data, tmp_path):
    train(data, tmp_path / "eager", head="flow", steps=1)
    train(data, tmp_path / "compiled", head="flow", steps=1, compile="aot_eager")
    close(tmp_path / "compiled", tmp_path / "eager")


def test_what_a_compiled_critic_cannot_do_is_said_before_the_folder_is_touched(data, tmp_path):
    settings = {"head": "adversarial", "compile": "eager", "loss.method": "autograd"}
    with pytest.raises(ValueError, match=r"compiled or sharded .* take fd"):
        train(data, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("head", ["flow", "adversarial"])
def test_eager_attention_trains_as_sdpa_does(head, data, tmp_path, monkeypatch):
    eager, calls = modeling_rope_mm.eager_attention, []
    monkeypatch.setattr(
        modeling_rope_mm, "eager_attention", lambda *args, **how: calls.append(1) or eager(*args, **how)
    )
    sdpa, its = tmp_path / "sdpa", tmp_path / "eager"
    train(data, sdpa, head=head, steps=3)
    assert not calls
    train(data, its, head=head, steps=3, attention="eager")
    assert calls
    for mine, other in zip(lines(its), lines(sdpa), strict=True):
        assert mine == pytest.approx(other, abs=1e-4, rel=1e-4)


@pytest.fixture
def bf16(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()  # a process has one state, and it is that of earlier tests
    yield
    AcceleratorState._reset_state()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's norm under autocast
@pytest.mark.parametrize("head", ["flow", "adversarial"])
def test_bf16_is_near_float32_and_keeps_weights_and_penalties_in_it(head, data, tmp_path, request):
    train(data, tmp_path / "full", head=head, steps=3)
    request.getfixturevalue("bf16")
    train(data, tmp_path / "half", head=head, steps=3)
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path / "half").values())
    first, its = lines(tmp_path / "half")[0], lines(tmp_path / "full")[0]
    assert first == pytest.approx(its, rel=2e-2, abs=2e-2)
    assert first["words"] != its["words"]
    if head == "adversarial":  # at the same weights, of the same drawings but for their rounding
        assert first["r1"] == pytest.approx(its["r1"], rel=1e-5)


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
@pytest.mark.skipif(
    find_spec("timm") is not None and not MADE and find_spec("torchvision") is None,
    reason="the accelerate command imports timm, which wants torchvision: pip uninstall timm",
)
def test_the_accelerate_command_starts_in_the_environment_that_make_makes():
    command, *words = (ROOT / "configs" / "accelerate" / "cpu.yaml").read_text().splitlines()[0][2:].split()
    script = shutil.which(command, path=Path(sys.executable).parent)
    done = subprocess.run(
        [script, *words, "--dry-run"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-6000:]}"
    assert done.stdout.startswith("out: runs/tiny")
