"""What wraps a model to save memory must not cost it angles: FSDP with a policy of bfloat16."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from rope_mm import Rotary

POSITIONS, _ = Rotary(16).place("text:3 image:2x2")
FAR = POSITIONS + 1000


class Layer(nn.Module):
    """Queries of tokens x (b, s, 16), rotated, and the table that rotated them."""

    def __init__(self, learnable: bool):
        super().__init__()
        self.to_q = nn.Linear(16, 16)
        self.rope = Rotary(16, "rope-tv", learnable=learnable)

    def forward(self, x, positions):
        q = self.to_q(x)[:, :, None]
        return self.rope(q, q, positions)[0], self.rope.cos_sin(positions)[0].clone()


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh, learnable, rope_alone, cast_forward_inputs=False):
    layer = Layer(learnable)
    if rope_alone:
        fully_shard(layer.rope, mesh=mesh)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast_forward_inputs)
    fully_shard(layer, mesh=mesh, mp_policy=policy)
    return layer


@pytest.mark.parametrize("learnable", [False, True])
def test_angles_stay_exact_and_a_learned_omega_gets_its_gradient_under_fsdp(mesh, learnable):
    layer = sharded(mesh, learnable, rope_alone=learnable)
    q, cos = layer(torch.randn(1, 7, 16).bfloat16(), FAR)
    assert q.dtype == torch.bfloat16
    assert torch.equal(cos, Rotary(16, "rope-tv", learnable=learnable).cos_sin(FAR)[0])
    (q.float().square().sum() + cos.sum()).backward()
    if learnable:
        assert layer.rope.omega_param.grad.full_tensor().abs().sum() > 0


def test_what_fsdp_would_cast_is_refused_with_the_cure(mesh):
    x = torch.randn(1, 7, 16).bfloat16()
    with pytest.raises(ValueError, match="shard this module by itself"):
        sharded(mesh, learnable=True, rope_alone=False)(x, FAR)
    with pytest.raises(ValueError, match="unless cast_forward_inputs=False"):
        sharded(mesh, learnable=False, rope_alone=False, cast_forward_inputs=True)(x, FAR)
