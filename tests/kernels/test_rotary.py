"""The rotary kernel against complex multiplication in float64; interpreted where there is no GPU."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import rope_mm.kernels
from rope_mm import rotation

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    # it is read where kernels are decorated, triton's own included: what was imported before is imported anew
    for module in [name for name in sys.modules if name.startswith(("triton", "rope_mm_kernels"))]:
        if not module.startswith("triton._C"):
            del sys.modules[module]
import triton  # noqa: E402
from rope_mm_kernels.rotary import rotate  # noqa: E402

# cuBLAS asks for it where algorithms must be deterministic, and reads it at its first use
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if INTERPRETED and tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9):
    from triton.runtime import interpreter

    def fma(self, x, y, z):
        """Round once, as hardware does; older interpreters round the product as well."""
        wide = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma

Four = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one call; n = 0 is an Omega without a head axis."""

    b: int = 2
    s: int = 5
    h: int = 4
    g: int = 2
    d: int = 16
    r: int = 8
    a: int = 3
    n: int = 0
    batched: bool = False

    def make(self, device: str, dtype: torch.dtype = torch.float32, reach: float = 8.0) -> Four:
        """q, k, positions (real, both signs, up to `reach`) and Omega, all asking for gradients."""
        random = torch.Generator().manual_seed(0)
        q, k = (torch.randn(self.b, self.s, heads, self.d, generator=random) for heads in (self.h, self.g))
        shape = (self.b, self.s, self.a) if self.batched else (self.s, self.a)
        positions = (2 * torch.rand(shape, generator=random) - 1) * reach
        omega = torch.rand((self.n, self.a, self.r) if self.n else (self.a, self.r), generator=random)
        made = q.to(dtype), k.to(dtype), positions, omega
        return tuple(x.to(device).requires_grad_() for x in made)


CASES = {
    "heads of 16 channels on three axes": Case(),
    "one axis": Case(a=1),
    "two axes and positions of each batch row": Case(a=2, batched=True),
    "64 channels and odd tokens": Case(b=1, s=11, d=64, r=32),
    "72 channels, not a power of two": Case(s=3, d=72, r=36),
    "80 channels and more heads than a block": Case(b=1, s=3, h=20, g=10, d=80, r=40),
    "a part of the channels": Case(d=72, r=11),
    "one pair of three": Case(d=6, r=1),
    "one Omega per head of k": Case(n=2, batched=True),
    "one Omega per head": Case(h=3, g=3, n=3),
    "one Omega for two heads of k": Case(h=8, g=4, n=2, d=24, r=10),
    "one head": Case(b=1, s=1, h=1, g=1, a=1),
    "many short sequences": Case(b=37, s=1, batched=True),
    "no tokens": Case(s=0),
}


def as_complex(x: Tensor, r: int, pairing: str) -> Tensor:
    """The rotated pairs of x (..., d) as complex numbers (..., r)."""
    sizes, pair = ((2, r), -2) if pairing == "half" else ((r, 2), -1)
    return torch.complex(*x[..., : 2 * r].double().unflatten(-1, sizes).unbind(pair))


def truth(q: Tensor, k: Tensor, positions: Tensor, omega: Tensor, pairing: str) -> tuple[Tensor, Tensor]:
    """Each pair as a complex number, times exp(i angle), in float64."""
    omega = omega.double().reshape(-1, *omega.shape[-2:])
    angle = (positions.double()[..., :, None, :, None] * omega).sum(-2)  # (..., s, n, r)

    def turned(x: Tensor) -> Tensor:
        r, heads = omega.shape[-1], x.shape[2]
        row = [head * len(omega) // heads for head in range(heads)]
        z = as_complex(x, r, pairing) * torch.exp(1j * angle[..., row, :])
        out = torch.stack((z.real, z.imag), -2 if pairing == "half" else -1).flatten(-2)
        return torch.cat((out, x[..., 2 * r :].double()), -1)

    return turned(q), turned(k)


def cotangents(out: tuple[Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Random gradients of q' and k', representable in this dtype, the same at every call."""
    random = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=random).to(dtype).to(x) for x in out]


def results(turn, inputs: Four, pairing: str) -> tuple[Tensor, ...]:
    """q', k' and the gradients of q, k, positions and Omega; the truth's are not rounded."""
    dtype = inputs[0].dtype
    if turn is truth:
        inputs = wider(inputs)
    out = turn(*inputs, pairing)
    return *out, *torch.autograd.grad(out, inputs, cotangents(out, dtype))


def wider(inputs: Four) -> Four:
    """The same numbers in float64."""
    q, k, positions, omega = (x.detach().double().requires_grad_() for x in inputs)
    return q, k, positions, omega


def agree(fast: tuple[Tensor, ...], right: tuple[Tensor, ...], eager=None, units: int = 8) -> None:
    """Error at most twice that of the definition in the same dtype, or some units of the largest value."""
    for index, (x, y) in enumerate(zip(fast, right, strict=True)):
        assert x.shape == y.shape
        if not x.numel():
            continue
        bound = units * torch.finfo(torch.float32).eps * y.abs().max().item()
        if eager is not None:
            bound = max(bound, 2 * (eager[index].double() - y).abs().max().item())
        error = (x.double() - y.to(x.device)).abs().max().item()
        assert error <= bound, f"result {index} of q', k', dq, dk, dpositions, domega is {error:.2e} off"


@pytest.fixture(autouse=True)
def unwritten_elements_are_nan_and_nothing_is_random() -> Iterator[None]:
    # torch fills what torch.empty returns in this mode
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="the kernel is compiled here")),
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="there is no CUDA device")]
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_and_gradients_are_those_of_complex_multiplication(
    case: Case, pairing: str, device: str
) -> None:
    inputs = case.make(device)
    eager = results(rotation.rotate, inputs, pairing)
    right = results(truth, inputs, pairing)
    agree(results(rotate, inputs, pairing), right, eager)
    agree(eager, right)


def strided(x: Tensor, layout: str) -> Tensor:
    """x (b, s, h, d) with other strides."""
    x = x.detach()
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":
        return torch.cat((x, x, x), -2)[..., x.shape[2] : 2 * x.shape[2], :]
    if layout == "offset":
        return torch.cat((x[..., :1], x), -1)[..., 1:]
    if layout == "channels first":
        return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    return x.repeat_interleave(2, 1)[:, ::2]


@pytest.mark.parametrize("layout", ["transposed", "packed", "offset", "channels first", "every other token"])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_strides_do_not_matter(layout: str, pairing: str, device: str) -> None:
    q, k, positions, omega = Case(d=24, r=9).make(device)
    other = strided(q, layout), strided(k, layout), positions, omega
    assert torch.equal(other[0], q) and other[0].stride() != q.stride()
    other[0].requires_grad_(), other[1].requires_grad_()
    plain = results(rotate, (q, k, positions, omega), pairing)
    assert all(torch.equal(x, y) for x, y in zip(results(rotate, other, pairing), plain, strict=True))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_gradients_of_a_sum_have_no_strides_and_are_right(pairing: str, device: str) -> None:
    fast = Case().make(device)
    right = wider(fast)
    for inputs, turn in ((fast, rotate), (right, truth)):
        sum(x.sum() for x in turn(*inputs, pairing)).backward()
    agree(tuple(x.grad for x in fast), tuple(x.grad for x in right))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int32, torch.int64])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_cosine_and_sine_are_3e_7_from_the_truth_at_position_16_million(
    pairing: str, kind: torch.dtype, device: str
) -> None:
    steps = torch.linspace(-1.6e7, 1.6e7, 257, dtype=torch.float64).round()
    positions = steps.to(kind)[:, None]
    omega = 10_000.0 ** -torch.linspace(0, 1, 32, dtype=torch.float64)[None]
    q = torch.zeros(1, 257, 1, 64, device=device)
    first = slice(0, 32) if pairing == "half" else slice(0, None, 2)
    q[..., first] = 1.0
    for table in (omega, omega.float()):
        turned, _ = rotate(q, q, positions.to(device), table.to(device), pairing)
        right, _ = truth(q.cpu(), q.cpu(), positions, table, pairing)
        assert (turned.cpu() - right).abs().max() <= 3e-7


def test_positions_beyond_float32_keep_all_their_digits(device: str) -> None:
    positions = torch.tensor([[2**24 + 1], [-(2**24) - 3]], device=device)
    q, k, _, omega = Case(s=2, a=1).make(device)
    agree(rotate(q, k, positions, omega), truth(q, k, positions, omega, "half"))


def test_gradients_at_large_positions_are_right(device: str) -> None:
    inputs = Case(batched=True).make(device, reach=1e5)
    agree(results(rotate, inputs, "half"), results(truth, inputs, "half"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_results_in_16_bits_are_the_truth_rounded_once(pairing: str, dtype: torch.dtype, device: str) -> None:
    inputs = Case(d=24, r=9).make(device, dtype)
    given, wanted = results(rotate, inputs, pairing), results(truth, inputs, pairing)
    # the interpreter cuts off where hardware rounds float32 to bfloat16: a whole unit instead of half of one
    unit = torch.finfo(dtype).eps * (1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5)
    for x, y in zip(given[:4], wanted[:4], strict=True):
        assert x.dtype == dtype
        assert ((x.double() - y).abs() <= unit * y.abs() + 1e-6 * y.abs().max()).all()
    # the gradient of an angle is Im(conj(y) dy), and y is the result as it was rounded
    products = [
        (as_complex(y, 9, pairing).conj() * as_complex(grad, 9, pairing)).imag.sum((0, 2))
        for y, grad in zip(given[:2], cotangents(given[:2], dtype), strict=True)
    ]
    angle, positions, omega = sum(products), inputs[2].double(), inputs[3].double()
    agree(given[4:], (angle @ omega.T, positions.T @ angle))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("case", [Case(), Case(n=2, batched=True), Case(d=24, r=9, a=1)], ids=str)
def test_gradients_of_a_gradient_penalty_are_right(case: Case, pairing: str, device: str) -> None:
    def penalty(turn, inputs: Four) -> tuple[Tensor, ...]:
        score = sum(x.sin().sum() for x in turn(*inputs, pairing))
        slopes = torch.autograd.grad(score, inputs, create_graph=True)
        return *slopes, *torch.autograd.grad(sum(x.square().sum() for x in slopes), inputs)

    inputs = case.make(device)
    right = penalty(truth, wider(inputs))
    # errors of the first gradients, times positions and sums over tokens, are in the second
    agree(penalty(rotate, inputs), right, penalty(rotation.rotate, inputs), units=32)


def test_gradients_are_the_same_bits_every_time(device: str) -> None:
    inputs = Case(s=33).make(device)
    first, again = (results(rotate, inputs, "half") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_an_unused_result_has_no_gradient(device: str) -> None:
    q, k, positions, omega = Case().make(device)
    rotate(q, k, positions, omega)[0].sum().backward()
    assert q.grad.any() and omega.grad.any() and not k.grad.any()


def test_results_are_kept_for_backward_only_where_angles_are_learned(device: str) -> None:
    q, k, positions, omega = Case().make(device)
    assert len(rotate(q, k, positions, omega.detach())[0].grad_fn.saved_tensors) == 4
    assert len(rotate(q, k, positions.detach(), omega.detach())[0].grad_fn.saved_tensors) == 2


def test_inputs_are_left_alone(device: str) -> None:
    inputs = Case().make(device)
    before = [x.detach().clone() for x in inputs]
    results(rotate, inputs, "half")
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


# torch loads its own decompositions with a function that it has deprecated
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_derivatives_are_refused(device: str) -> None:
    q, k, positions, omega = (x.detach() for x in Case().make(device))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        rotate(torch.autograd.forward_ad.make_dual(q, q), k, positions, omega)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pairing": "block"}, "blocks must be numbers"),
        ({"omega": torch.ones(3, 9)}, "9 pairs need 18 channels"),
        ({"omega": torch.ones(3, 3, 8)}, "the 3 heads of omega must divide"),
        ({"omega": torch.ones(4, 3, 8)}, "the 4 heads of omega must divide"),
        ({"omega": torch.ones(3, 0)}, "omega must be"),
        ({"omega": torch.ones(2, 8)}, "positions must be"),
        ({"omega": torch.ones(3, 8, dtype=torch.bfloat16)}, "keep it in float32 or float64"),
        ({"positions": torch.ones(4, 3)}, "positions must be"),
        ({"positions": torch.ones(3, 5, 3)}, "positions must be"),
        ({"k": torch.ones(2, 4, 2, 16)}, "differ in heads only"),
        ({"q": torch.ones(2, 5, 4, 16, dtype=torch.float64)}, "use plain torch"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, object], words: str) -> None:
    fit = dict(zip(("q", "k", "positions", "omega"), Case().make("cpu"), strict=True))
    with pytest.raises(ValueError, match=words):
        rotate(**{**fit, **change})


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_the_door_of_the_library_opens_to_the_kernel(
    pairing: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rope_mm.kernels, "served", lambda device, dtype: True)
    q, k, positions, omega = replace(Case(), n=2).make(device)
    turn = rope_mm.kernels.make_turn(positions, omega, pairing)
    for opened in (rope_mm.kernels.rotate(q, k, positions, omega, pairing), turn(q, k)):
        for x, y in zip(opened, rotate(q, k, positions, omega, pairing), strict=True):
            assert torch.equal(x, y)
            assert x.grad_fn.name() == "RotateBackward"
