"""The kernels as ops: what torch asks of an op, and that graphs hold them and compute what launches do."""

from functools import partial

import pytest
import torch
from rope_mm_kernels import (
    definition,
    norm_rotary,
    norm_rotate,
    norm_rotate_by_table,
    rotary,
    rotate,
    rotate_,
    rotate_by_table,
)
from rope_mm_kernels.plan import make_spec
from rope_mm_kernels.table import table_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from truth import INTERPRETED, Case, agree, cotangents, results

import rope_mm
import rope_mm.rotary.dispatch

CASES = {
    "halves": Case(),
    "neighbours, one Omega per head of k": Case(n=2, batched=True, d=20, pairing="interleaved", tail=True),
    "blocks, times a factor, angles of transformers": Case(
        d=24, r=9, pairing="block", blocks=(4, 5), factor=1.5, mode="hf"
    ),
    "no keys, one axis": Case(g=0, a=1, d=24),
}
OPS = torch.ops.rope_mm
CHECKS = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch._dynamo.reset()  # all of one code together may be eight


def arguments(case: Case, device: str):
    """What `rotate`'s ops are given: q, k, positions and Omega without heads shared, weights; the spec."""
    q, k, positions, omega, *weights = (x.detach() for x in case.make(device, normed=True))
    spec = make_spec(q, k, positions, omega, **case.how)
    positions, omega = (x.contiguous() for x in rotary.expand_inputs(q, positions, omega))
    return [q, k, positions, omega, *weights], spec


def by_table(case: Case, device: str):
    """The same by tables of a batch."""
    q, k, _, _, *weights = (x.detach() for x in case.make(device, normed=True))
    tables = torch.rand(2, case.b, case.s, 2 * case.r, device=device)
    *tables, spec = table_inputs(q, k, *tables, case.pairing, case.blocks, case.tail)
    return [q, k, *tables, *weights], spec


@EACH
@pytest.mark.parametrize("given", [arguments, by_table])
def test_a_cpu_without_the_interpreter_computes_what_the_kernels_do(case: Case, given, device: str) -> None:
    inputs, spec = given(case, device)
    needs = (spec.mode != "table",) * 2
    out = definition.rotate(*inputs[:4], spec)
    grads = cotangents(out, torch.float32)
    back = (*grads, *inputs[2:4], out, needs, spec)
    normed = (*inputs, *grads, needs, 1e-6, spec)
    for plain, launched in (
        (out, rotary.launch_forward(*inputs[:4], spec)),
        (definition.rotate_backward(*back), rotary.launch_backward(*back)),
        (definition.norm_rotate(*inputs, 1e-6, spec), norm_rotary.launch_forward(*inputs, 1e-6, spec)),
        (definition.norm_rotate_backward(*normed), norm_rotary.launch_backward(*normed)),
    ):
        agree(plain, launched, units=16)
        assert [x.stride() for x in plain] == [x.stride() for x in launched]
    q, k = (x.clone() for x in inputs[:2])
    definition.rotate_(q, k, *inputs[2:4], spec)
    assert torch.equal(q, out[0]) and torch.equal(k, out[1])


@pytest.mark.slow
@pytest.mark.compile
@CHECKS
def test_ops_keep_what_torch_asks_of_them(device: str) -> None:
    case = Case(b=1, s=2, h=2, n=2, d=20, pairing="block", blocks=(3, 5), tail=True)
    inputs, spec = arguments(case, device)
    q, k, positions, omega = inputs[:4]
    asking = [x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(OPS.rotate.default, (*asking[:4], *spec))
    torch.library.opcheck(OPS.norm_rotate.default, (*asking, 1e-6, *spec))
    torch.library.opcheck(OPS.rotate_.default, (q.clone(), k.clone(), positions, omega, *spec))
    needs = [False, True]
    torch.library.opcheck(OPS.rotate_backward.default, (q, k, positions, omega, [q, k], needs, *spec))
    torch.library.opcheck(OPS.norm_rotate_backward.default, (*inputs, q, k, needs, 1e-6, *spec))
    (q, k, *tables_and_weights), spec = by_table(case, device)
    asking = q.requires_grad_(), k, *tables_and_weights
    torch.library.opcheck(OPS.rotate.default, (*asking[:4], *spec))
    torch.library.opcheck(OPS.norm_rotate.default, (*asking, 1e-6, *spec))


def normed(*inputs, **how):
    """`norm_rotate` with weights before what is no tensor."""
    return norm_rotate(*inputs, **how)


@pytest.mark.compile
@pytest.mark.parametrize("turn", [rotate, normed])
def test_one_graph_serves_all_lengths_with_values_and_gradients_of_a_launch(turn, device: str) -> None:
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(turn, fullgraph=True, dynamic=True, backend=counted)
    # sizes that happen to be equal are taken for one, so these are not
    graphs = []
    for s in (7, 8):
        case = Case(b=1, s=s, n=2, d=24, r=9, tail=True, pairing="block", blocks=(4, 5))
        inputs = case.make(device, normed=turn is normed)
        for x, y in zip(results(compiled, inputs, case.how), results(turn, inputs, case.how), strict=True):
            assert torch.equal(x, y) and x.stride() == y.stride()
        graphs.append(counted.frame_count)  # floats are traced twice, so the first may count for two
    assert graphs[0] == graphs[1]


@pytest.mark.compile
def test_gradients_without_strides_and_checkpoints_go_through_a_graph(device: str) -> None:
    inputs = Case(batched=True).make(device)

    def score(q, k, positions, omega):
        return sum(x.sum() for x in checkpoint(rotate, q, k, positions, omega, use_reentrant=False))

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs), inputs)
    agree(found, tuple(x.double() for x in torch.autograd.grad(score(*inputs), inputs)))
    plain = sum(x.sum() for x in rotate(*inputs))
    agree(found, tuple(x.double() for x in torch.autograd.grad(plain, inputs)))


@pytest.mark.compile
def test_tables_and_rotation_in_place_go_through_a_graph(device: str) -> None:
    q, k, positions, omega = (x.detach() for x in Case().make(device))
    tables = torch.rand(2, 1, 5, 16, device=device)
    weights = torch.rand(2, 16, device=device)
    for turn, given in ((rotate_by_table, ()), (norm_rotate_by_table, weights)):
        compiled = torch.compile(turn, fullgraph=True, backend="aot_eager")
        inputs = [x.clone().requires_grad_() for x in (q, k, *given)]
        found, wanted = (call(*inputs[:2], *tables, *inputs[2:]) for call in (compiled, turn))
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
        slopes = (torch.autograd.grad(sum(x.sin().sum() for x in out), inputs) for out in (found, wanted))
        assert all(torch.equal(x, y) for x, y in zip(*slopes, strict=True))
    wanted = rotate(q, k, positions, omega)
    found = torch.compile(rotate_, fullgraph=True, backend="aot_eager")(q, k, positions, omega)
    assert all(torch.equal(x, y) for x, y in zip((q, k, *found), (*wanted, *wanted), strict=True))


@pytest.mark.compile
def test_rotation_in_place_with_gradients_goes_through_a_graph(device: str) -> None:
    inputs = Case(n=2, batched=True).make(device)

    def in_place(q, k, positions, omega):
        return rotate_(q * 1.0, k * 1.0, positions, omega)

    compiled = torch.compile(in_place, fullgraph=True, backend="aot_eager")
    for x, y in zip(results(compiled, inputs, {}), results(rotate, inputs, {}), strict=True):
        assert torch.equal(x, y)


class Layer(torch.nn.Module):
    """A learned Omega."""

    def __init__(self, omega):
        super().__init__()
        self.omega = torch.nn.Parameter(omega)

    def forward(self, q, k, positions):
        return rotate(q, k, positions, self.omega)


@pytest.mark.compile
@CHECKS
def test_an_exported_module_holds_the_op_and_can_be_trained_and_differentiated_twice(device: str) -> None:
    q, k, positions, omega = (x.detach() for x in Case(s=7).make(device))
    layer = Layer(omega)
    length = {1: torch.export.Dim("s", min=2)}
    dims = (length, length, {0: length[1]})
    exported = torch.export.export(layer, (q, k, positions), dynamic_shapes=dims)
    assert [str(node.target) for node in exported.graph.nodes].count("rope_mm.rotate.default") == 1
    trained, (q, k, positions, _) = exported.module(), (x.detach() for x in Case(s=4).make(device))
    q.requires_grad_()
    for module in (layer, trained):
        slope = torch.autograd.grad(sum(x.sin().sum() for x in module(q, k, positions)), q, create_graph=True)
        slope[0].square().sum().backward()
    agree((trained.omega.grad,), (layer.omega.grad.double(),))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="there is no CUDA device")
def test_launches_are_recorded_in_a_cuda_graph_forward_and_backward() -> None:
    case = Case(n=2, pairing="block", blocks=(3, 5))
    inputs = case.make("cuda", normed=True)
    for turn, given in ((rotate, inputs[:4]), (norm_rotate, inputs)):
        run = partial(results, turn, given, case.how)
        wanted = run()
        graph = torch.cuda.CUDAGraph()
        out = [x.detach() for x in turn(*given, **case.how)]
        grads = cotangents(tuple(out), torch.float32)
        with torch.cuda.graph(graph):
            turned = turn(*given, **case.how)
            found = *turned, *torch.autograd.grad(turned, given, grads)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.compile
def test_rotate_calls_the_op_in_a_compiled_graph(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope_mm.rotary.dispatch, "unsupported_reason", lambda device, dtype: "")
    rope = rope_mm.Rotary(16, learnable=True).to(device)
    q, k, positions, _ = (x.detach() for x in Case().make(device))
    exported = torch.export.export(rope, (q, k, positions))
    assert [str(node.target) for node in exported.graph.nodes].count("rope_mm.rotate.default") == 1
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    for turned in (compiled, exported.module()):
        assert all(
            torch.equal(x, y) for x, y in zip(turned(q, k, positions), rope(q, k, positions), strict=True)
        )
    assert rope_mm.rotary.dispatch.explain_dispatch(q, k, positions, rope.omega).startswith(
        "Triton's kernel: "
    )
