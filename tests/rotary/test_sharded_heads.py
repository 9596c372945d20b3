"""Tensor parallelism: every process rotates the heads that it has."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rope_mm import Rotary, rotate


def test_processes_that_rotate_their_own_heads_rotate_all():
    root = Path(__file__).parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        "PYTHONPATH": f"{root}:{root / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [*torchrun, __file__], env=environment, capture_output=True, text=True, timeout=100, cwd=root
    )
    assert done.returncode == 0, done.stderr


def by_shards(turn, q, k, mesh):
    """What `turn` makes of the heads of each process, gathered, and its gradients."""
    q, k = (distribute_tensor(x, mesh, [Shard(2)]).requires_grad_() for x in (q, k))
    out = [DTensor.from_local(x, mesh, [Shard(2)]) for x in turn(q.to_local(), k.to_local())]
    loss = sum(x.full_tensor().sin().sum() for x in out)
    return [x.full_tensor() for x in (*out, *torch.autograd.grad(loss, (q, k)))]


def whole(turn, q, k):
    """The same in one process."""
    q, k = (x.clone().requires_grad_() for x in (q, k))
    out = turn(q, k)
    return [*out, *torch.autograd.grad(sum(x.sin().sum() for x in out), (q, k))]


def refuse(q, k, positions, rope) -> None:
    """Heads that are spread over processes are not taken for those of one."""
    angles = rope.angles(positions)
    calls = [
        lambda: rope(q, k, positions),
        lambda: angles.rotate(q, k),
        lambda: angles.rotate_one(q),
        lambda: rotate(q, k, positions, rope.omega),
    ]
    if find_spec("triton"):
        from rope_mm_kernels import rotate as launch

        calls.append(lambda: launch(q, k, positions, rope.omega))
    for call in calls:
        with pytest.raises(ValueError, match=r"DTensor.*to_local"):
            call()


def compare() -> None:
    """A shared Omega, and one per head of k, whose rows are sharded as the heads are."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 8, 24), torch.randn(2, 7, 4, 24)
    rope = Rotary(24)
    positions, _ = rope.place("text:3 image:2x2")
    omega = Rotary(24, "mixed", heads=4).omega.detach()
    mine = distribute_tensor(omega, mesh, [Shard(0)]).to_local()
    for local, all_heads in (
        (lambda q, k: rope(q, k, positions), lambda q, k: rope(q, k, positions)),
        (lambda q, k: rotate(q, k, positions, mine), lambda q, k: rotate(q, k, positions, omega)),
    ):
        for x, y in zip(by_shards(local, q, k, mesh), whole(all_heads, q, k), strict=True):
            torch.testing.assert_close(x, y)
    refuse(*(distribute_tensor(x, mesh, [Shard(2)]) for x in (q, k)), positions, rope)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    compare()
    os._exit(0)  # threads of gloo that outlive the interpreter would abort the process now and then
