"""Llama by our schemes on two processes: its parameters in shards (FSDP2), or its heads (tensor parallel)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from rope_mm.hf import positions_for, rope_of, set_rope, unset_rope, use_kernels

IDS = torch.arange(3, 16)[None]
WITHIN = {"rtol": 1e-4, "atol": 3e-5}


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path):
    root = Path(__file__).parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {"PYTHONPATH": f"{root}:{root}/kernels", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*torchrun, __file__, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, initializer_range=0.2, **sizes))


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(model: LlamaForCausalLM, other: LlamaForCausalLM) -> None:
    """Logits, gradients and generated words of a model in two processes and of one in one."""
    p = positions_for(other, ["text:3 image:2x3 text:4"])
    mine, theirs = (one(IDS, labels=IDS, position_ids=p) for one in (model, other))
    torch.testing.assert_close(whole(mine.logits), theirs.logits, **WITHIN)
    mine.loss.backward()
    theirs.loss.backward()
    grads = {name: whole(x.grad) for name, x in model.named_parameters()}
    for name, x in other.named_parameters():
        torch.testing.assert_close(grads.pop(name), x.grad, **WITHIN)
    assert not grads
    run = {"input_ids": IDS, "position_ids": p, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**run), other.generate(**run))


def shards(mesh: DeviceMesh) -> None:
    """The scheme before the shards and after them; a learned Omega is a shard too."""
    for first, learnable, kernels in ((True, True, True), (True, False, False), (False, True, False)):
        model, other = llama(), llama()
        set_rope(other, "rope-tv", learnable=learnable)
        if first:
            set_rope(model, "rope-tv", learnable=learnable)
        if kernels:
            use_kernels(model)
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        if not first:
            set_rope(model, "rope-tv", learnable=learnable)
        assert not learnable or isinstance(rope_of(model).omega_param, DTensor) == first
        compare(model, other)
        unset_rope(model)
        assert torch.equal(model(IDS).logits, llama()(IDS).logits)


def heads(folder: str) -> None:
    """Each process has half of the heads, by transformers' own plan."""
    llama().save_pretrained(folder)  # the first process alone does
    dist.barrier()
    plan = DistributedConfig(tp_size=2, tp_plan="auto")
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=plan)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    before = model(IDS).logits
    for kernels in (False, True):
        other = llama()
        for one in (model, other):
            set_rope(one, "rope-tv")
        if kernels:
            use_kernels(model)
        compare(model, other)
        unset_rope(model)
        model.zero_grad()
        assert torch.equal(model(IDS).logits, before)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    shards(init_device_mesh("cpu", (2,)))
    heads(sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that outlive the interpreter would abort the process now and then
