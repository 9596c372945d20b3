"""Rotation in place refuses q and k that share elements, however it runs, and serves all others."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rope_mm_kernels import in_place

from rope_mm import rotate
from rope_mm.rotary.dispatch import make_angles, rotate_

B, S, D = 2, 5, 16
POSITIONS, OMEGA = torch.arange(S)[:, None].expand(-1, 3), torch.ones(3, 8)

FUSED = torch.randn(B, S, 4, 3, D)  # of each head, its q, k and v
SHARED = [
    ("the same tensor", lambda x: (x[:, :, :, 0],) * 2),
    ("the same elements", lambda x: (x[:, :, :, 0], x[:, :, :, 0].view_as(x[:, :, :, 0]))),
    ("a head that is in both", lambda x: (x[:, :, :2, 0], x[:, :, 1:, 0])),
    (
        "half of the channels",
        lambda x: [x.flatten(2)[..., i : i + 4 * D].view(B, S, 4, D) for i in (0, 1)],
    ),
    ("tokens one apart", lambda x: (x[:, :-1, :, 0], x[:, 1:, :, 0])),
]


APART = [
    lambda x: (x[:, :, :, 0], x[:, :, :, 1]),
    lambda x: (x[:, :, :3, 0], x[:, :, 3:, 0]),
    lambda x: (x[:, :, :, 0], x[:, :, :1, 2]),
    lambda x: (x[:, 0:4:2, :, 0], x[:, 1:4:2, :, 0]),
    lambda x: x.view(B, S, 12, D).split((8, 4), 2),
    lambda x: x.view(B, 12, S, D).transpose(1, 2).split((8, 4), 2),
    lambda x: (x.view(-1, S, 2, D)[:2], x.view(-1, S, 2, D)[2:4]),
]


@pytest.mark.parametrize("function", ["rotate_", "kernel", "angles"])
@pytest.mark.parametrize(("name", "make"), SHARED)
def test_in_place_refuses_q_and_k_that_share_elements(name, make, function):
    q, k = make(FUSED.clone())
    positions = POSITIONS[: q.shape[1]]
    rotate_by = {
        "rotate_": rotate_,
        "kernel": pytest.importorskip("rope_mm_kernels.rotary").rotate_,
        "angles": lambda q, k, *where: make_angles(*where).rotate_(q, k),
    }[function]
    with pytest.raises(ValueError, match="q and k share elements"):
        rotate_by(q, k, positions, OMEGA)


@pytest.mark.parametrize("make", APART)
def test_in_place_rotates_q_and_k_that_lie_in_one_tensor_beside_each_other(make):
    q, k = make(FUSED.clone())
    positions = POSITIONS[: q.shape[1]]
    expected = rotate(q.clone(), k.clone(), positions, OMEGA)
    for x, y in zip(rotate_(q, k, positions, OMEGA), expected, strict=True):
        torch.testing.assert_close(x, y)


def rotate_one_memory(x, first):
    """q of heads 0 to 3 and k of heads `first` and on of twice x (b, s, 6, d), rotated in place."""
    x = 2 * x
    return rotate_(x[:, :, :4], x[:, :, first:], POSITIONS, OMEGA)


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x)[0].sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[0],
    "grad in vmap": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x)[0].sum()))(x[None]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_in_place_looks_at_the_memory_below_a_transform(name):
    x = torch.randn(B, S, 6, D)
    TRANSFORMS[name](lambda x: rotate_one_memory(x, 4), x)  # beside each other
    with pytest.raises(ValueError, match="q and k share elements"):
        TRANSFORMS[name](lambda x: rotate_one_memory(x, 2), x)


@pytest.mark.parametrize("borrow", [lambda x: torch.from_numpy(x.numpy()), torch.from_dlpack])
def test_in_place_knows_memory_that_came_through_numpy_or_dlpack(borrow):
    x = torch.randn(B, S, 6, D)
    with pytest.raises(ValueError, match="q and k share elements"):
        rotate_(x[:, :, :4], borrow(x)[:, :, 2:], POSITIONS, OMEGA)
    expected = rotate(x[:, :, :4].clone(), x[:, :, 4:].clone(), POSITIONS, OMEGA)
    for y, z in zip(rotate_(x[:, :, :4], borrow(x)[:, :, 4:], POSITIONS, OMEGA), expected, strict=True):
        torch.testing.assert_close(y, z)


@given(st.data())
def test_views_overlap_where_numpy_finds_an_element_of_both(data):
    memory = torch.zeros(400)

    def view():
        shape = [data.draw(st.integers(1, 4)) for _ in range(4)]
        strides = [data.draw(st.integers(1, 24)) for _ in range(4)]
        return torch.as_strided(memory, shape, strides, data.draw(st.integers(0, 100)))

    q, k = view(), view()
    assert in_place.overlap(q, k) == np.shares_memory(q.numpy(), k.numpy())


@pytest.fixture
def compiled():
    """`rotate_` as a graph without breaks, new each time: torch takes an offset of 1 for another."""
    torch._dynamo.reset()
    return torch.compile(rotate_, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make"), SHARED[1:])
def test_a_compiled_graph_refuses_q_and_k_that_share_elements(name, make, compiled):
    q, k = make(FUSED.clone())
    with pytest.raises(Exception, match="q and k share elements"):
        compiled(q, k, POSITIONS[: q.shape[1]], OMEGA)


@pytest.mark.slow
@pytest.mark.parametrize("make", APART)
def test_a_compiled_graph_rotates_q_and_k_that_lie_beside_each_other(make, compiled):
    q, k = make(FUSED.clone())
    positions = POSITIONS[: q.shape[1]]
    expected = rotate(q.clone(), k.clone(), positions, OMEGA)
    for x, y in zip(compiled(q, k, positions, OMEGA), expected, strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(q, expected[0])  # overwritten


@pytest.mark.slow
@pytest.mark.parametrize("transform", [None, "vmap"])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("first", [2, 4])
def test_a_compiled_graph_looks_at_views_that_it_makes_itself(first, dynamic, transform):
    torch._dynamo.reset()
    # Inductor stores each view in a tensor of its own; a dynamic graph takes it seconds
    backend = "aot_eager" if transform or (dynamic and first == 4) else "inductor"

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    def rotate_views(x):
        if transform:
            return torch.func.vmap(lambda x: rotate_one_memory(x, first))(x[None])
        return rotate_one_memory(x, first)

    x = torch.randn(B, S, 6, D)
    if first == 4:
        expected = rotate(2 * x[:, :, :4], 2 * x[:, :, 4:], POSITIONS, OMEGA)
        for y, z in zip(rotate_views(x), expected, strict=True):
            torch.testing.assert_close(y.view_as(z), z)
        return
    with pytest.raises(Exception, match="q and k share elements"):
        rotate_views(x)


class Views(torch.nn.Module):
    """q of the first four heads, k of those from `first` on."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, x):
        x = 2 * x
        return rotate_(x[:, :, :4], x[:, :, self.first :], POSITIONS, OMEGA)


def test_an_exported_graph_has_no_op_of_ours_and_views_that_overlap_are_not_exported():
    x = torch.randn(B, S, 6, D)
    exported = torch.export.export(Views(4), (x,), strict=False)
    expected = rotate(2 * x[:, :, :4], 2 * x[:, :, 4:], POSITIONS, OMEGA)
    for y, z in zip(exported.module()(x), expected, strict=True):
        torch.testing.assert_close(y, z)
    assert not [node for node in exported.graph.nodes if "rope_mm" in str(node.target)]
    with pytest.raises(ValueError, match="q and k share elements"):
        torch.export.export(Views(2), (x,), strict=False)
