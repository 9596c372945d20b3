"""One table of refusals, the same on a CPU, in a recorded graph and by the kernel."""

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

from rope_mm import Rotary, rotate
from rope_mm.rotary.dispatch import make_angles, rotate_, rotate_by_angles, rotate_by_table

B, S, H, G, D, A, R = 2, 5, 4, 2, 16, 3, 8
FIT = {
    "q": torch.ones(B, S, H, D),
    "k": torch.ones(B, S, G, D),
    "positions": torch.arange(S)[:, None].expand(-1, A),
    "omega": torch.ones(A, R),
}
FORMS = {
    "other tokens": ({"k": torch.ones(B, S - 1, G, D)}, "alike but for the heads"),
    "other rows": ({"k": torch.ones(1, S, G, D)}, "alike but for the heads"),
    "three dimensions": ({"q": torch.ones(S, H, D), "k": torch.ones(S, G, D)}, "alike but for the heads"),
    "heads before tokens": (
        {"q": torch.ones(B, H, S, D), "k": torch.ones(B, G, S, D)},
        r"These look like \(b, heads, s, d\): give q.transpose\(1, 2\)",
    ),
    "as many heads before tokens": (
        {"q": torch.ones(B, H, S, D), "k": torch.ones(B, H, S, D)},
        r"looks like \(b, heads, s, d\); give q.transpose\(1, 2\)",
    ),
    "dtypes of their own": ({"q": torch.ones(B, S, H, D).bfloat16()}, "give both in one dtype"),
    "integer heads": (
        {"q": torch.ones(B, S, H, D).int(), "k": torch.ones(B, S, G, D).int()},
        "heads are torch.int32",
    ),
    "complex heads": (
        {"q": torch.ones(B, S, H, D, dtype=torch.cfloat), "k": torch.ones(B, S, G, D, dtype=torch.cfloat)},
        "heads are torch.complex64",
    ),
    "a list of positions": ({"positions": [[0.0] * A] * S}, r"positions is a list; give a tensor"),
    "an array of positions": ({"positions": np.zeros((S, A))}, "positions is a ndarray; give a tensor"),
    "an array of queries": ({"q": np.zeros((B, S, H, D))}, "q is a ndarray; give a tensor"),
    "a number as Omega": ({"omega": 1.0}, "omega is a float; give a tensor"),
    "complex positions": ({"positions": torch.ones(S, A, dtype=torch.cfloat)}, "are torch.complex64"),
    "positions that are true or false": ({"positions": torch.ones(S, A) > 0}, "are torch.bool"),
    "positions in bfloat16": ({"positions": torch.ones(S, A).bfloat16()}, "cannot count past 256"),
    "positions in float16": ({"positions": torch.ones(S, A).half()}, "cannot count past 256"),
    "too few axes": ({"positions": torch.ones(S, A - 1)}, "with the a = 3 axes of Omega$"),
    "axes first": ({"positions": torch.ones(A, B, S)}, r"Hugging Face's order .*permute\(1, 2, 0\)"),
    "too many tokens": ({"positions": torch.ones(S + 2, A)}, "one position for each token"),
    "too many rows": ({"positions": torch.ones(B + 1, S, A)}, "one position for each token"),
    "Omega in bfloat16": ({"omega": torch.ones(A, R).bfloat16()}, "keep it in float32 or float64"),
    "Omega in float16": ({"omega": torch.ones(A, R).half()}, "keep it in float32 or float64"),
    "an empty Omega": ({"omega": torch.ones(A, 0)}, "and not empty"),
    "too many pairs": ({"omega": torch.ones(A, R + 1)}, "9 pairs need 18 channels"),
    "rows that do not divide q": ({"omega": torch.ones(3, A, R)}, "Omega has 3 heads, which must divide"),
    "rows that do not divide k": ({"omega": torch.ones(4, A, R)}, "Omega has 4 heads, which must divide"),
    "an unknown pairing": ({"pairing": "halves"}, "did you mean 'half'"),
    "an unknown mode": ({"mode": "exakt"}, "did you mean 'exact'"),
    "blocks of halves": ({"blocks": (4, 4)}, "omit them with 'half'"),
    "blocks of neighbours": ({"blocks": (8,), "pairing": "interleaved"}, "omit them with 'interleaved'"),
    "no blocks": ({"pairing": "block"}, "sum to the 8 pairs"),
    "blocks that are too large": ({"pairing": "block", "blocks": (4, 5)}, "sum to the 8 pairs"),
    "a negative block": ({"pairing": "block", "blocks": (9, -1)}, "must be positive"),
}
VALUES = {
    "positions that are not finite": ({"positions": torch.full((S, A), torch.nan)}, "NaN or infinity"),
    "infinite positions in float64": (
        {"positions": torch.full((S, A), torch.inf, dtype=torch.float64)},
        "NaN or infinity",
    ),
    "positions that float32 cannot count": (
        {"positions": torch.full((S, A), 2.0**24 + 2)},
        r"cannot count past 2\*\*24",
    ),
    "real positions beyond what float64 counts": (
        {"positions": torch.full((S, A), 2.0**54, dtype=torch.float64)},
        r"cannot be counted past 2\*\*53",
    ),
    "an Omega that is no number": ({"omega": torch.full((A, R), torch.nan)}, "Omega holds NaN or infinity"),
    "an infinite Omega": ({"omega": torch.full((A, R), torch.inf).double()}, "Omega holds NaN or infinity"),
    "whole numbers beyond what float64 counts": (
        {"positions": torch.full((S, A), 2**54 + 1)},
        r"cannot be counted past 2\*\*53",
    ),
    "angles that no path can make": (
        {"positions": torch.full((S, A), 2.0**30).double(), "omega": torch.full((A, R), 2.0**11)},
        r"angles past 2\*\*40 radians",
    ),
}
FACTORS = {
    "a factor of nothing": ({"factor": 0.0}, "factor is 0.0"),
    "a factor that is no number": ({"factor": torch.nan}, "factor is nan"),
    "a factor that turns the sign": ({"factor": -1.0}, "factor is -1.0; give a finite number > 0"),
    "a truth value as factor": ({"factor": True}, "factor is True; give a finite number > 0"),
    "a string as factor": ({"factor": "1"}, "factor is 1; give a finite number > 0"),
    "a string as tail": ({"tail": "no"}, "tail is 'no'; give True"),
    "blocks of halves": (
        {"pairing": "block", "blocks": (4.0, 4.0)},
        r"blocks are \(4.0, 4.0\); give a tuple",
    ),
    "blocks that are one number": ({"pairing": "block", "blocks": 8}, "blocks are 8; give a tuple"),
}
FACTORS |= {
    f"{blocks!r} as blocks": ({"blocks": blocks}, "give a tuple of whole numbers")
    for blocks in (None, 0, False)
} | {
    f"a factor of {factor:.0e}": ({"factor": factor}, "in float32 no 0") for factor in (1e308, 1e-320, 2**70)
}
KINDS = {
    "sparse queries": ({"q": FIT["q"].to_sparse()}, "q is a sparse or nested tensor; give a dense one"),
    "sparse positions": (
        {"positions": FIT["positions"].to_sparse()},
        "positions is a sparse or nested tensor",
    ),
    "a sparse Omega": ({"omega": FIT["omega"].to_sparse()}, "omega is a sparse or nested tensor"),
    "positions without numbers": (
        {"positions": FIT["positions"].to("meta")},
        "positions is on the meta device",
    ),
    "an Omega without numbers": ({"omega": FIT["omega"].to("meta")}, "omega is on the meta device, without"),
}
REFUSED = {**FORMS, **VALUES, **FACTORS, **KINDS}


def by_kernel(q, k, positions, omega, **how):
    """The kernel, interpreted where there is no GPU."""
    return pytest.importorskip("rope_mm_kernels.rotary").rotate(q, k, positions, omega, **how)


def by_normed_kernel(q, k, positions, omega, **how):
    """The kernel that normalises heads first."""
    normed = pytest.importorskip("rope_mm_kernels.norm_rotary").norm_rotate
    return normed(q, k, positions, omega, torch.ones(D), torch.ones(D), **how)


def by_kernel_in_place(q, k, positions, omega, **how):
    """The kernel that overwrites heads."""
    return pytest.importorskip("rope_mm_kernels.rotary").rotate_(q, k, positions, omega, **how)


def when_compiled(function):
    """The function under torch.compile, in a graph of its own."""

    def call(**inputs):
        torch._dynamo.reset()
        return torch.compile(function, backend="eager")(**inputs)

    return call


EAGER = {
    "eager": rotate,
    "in place": rotate_,
    "kernel": by_kernel,
    "kernel in place": by_kernel_in_place,
    "normalising kernel": by_normed_kernel,
}
COMPILED = {f"compiled, {way}": when_compiled(function) for way, function in EAGER.items()}


def refusals(paths, words, **inputs):
    """The sentences by which these paths refuse."""
    said = {}
    for path, function in paths.items():
        with pytest.raises(ValueError, match=words) as error:
            function(**inputs)
        said[path] = str(error.value)
    return said


class Layer(nn.Module):
    """A rotation to record."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, *tensors):
        return rotate(*tensors, **self.how)


def recorded(q, k, positions, omega, **how):
    """A graph that is recorded and run."""
    module = torch.export.export(Layer(how), (q, k, positions, omega)).module()
    return module(q, k, positions, omega)


@pytest.mark.parametrize("name", REFUSED)
def test_every_path_refuses_the_same_in_the_same_words(name):
    change, words = REFUSED[name]
    said = refusals({**EAGER, "compiled": COMPILED["compiled, eager"]}, words, **{**FIT, **change})
    assert len(said) == 6 and len(set(said.values())) == 1, said
    assert "\n" not in said["eager"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_every_path_when_compiled_refuses_as_it_does_in_eager_mode(name):
    change, words = REFUSED[name]
    said = refusals({"eager": rotate, **COMPILED}, words, **{**FIT, **change})
    assert len(said) == 6 and len(set(said.values())) == 1, said


# torch.export takes no arrays at all
@pytest.mark.parametrize("name", [name for name in FORMS if not name.startswith("an array")])
def test_a_graph_refuses_the_same_when_it_is_recorded(name):
    change, words = FORMS[name]
    with pytest.raises(ValueError, match=words):
        recorded(**{**FIT, **change})


@pytest.mark.parametrize("name", VALUES)
def test_a_graph_refuses_values_when_it_runs(name):
    change, words = VALUES[name]
    with pytest.raises(RuntimeError, match=words):
        recorded(**{**FIT, **change})


def test_a_compiled_graph_refuses_values_in_the_same_words_when_it_runs():
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    assert VALUES
    for change, _ in VALUES.values():
        with pytest.raises(ValueError, match=r"2|NaN") as eager:
            rotate(**{**FIT, **change})
        with pytest.raises(ValueError, match=r"2|NaN") as error:
            compiled(**{**FIT, **change})
        assert str(error.value) == str(eager.value)
    for x, y in zip(compiled(**FIT), rotate(**FIT), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("mode", ["exact", "hf"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64]
)
def test_every_path_takes_the_same(dtype, kind, mode):
    inputs = {**FIT, "q": torch.randn(B, S, H, D).to(dtype), "k": torch.randn(B, S, G, D).to(dtype)}
    inputs["positions"] = inputs["positions"].to(kind)
    wanted = rotate(**inputs, mode=mode)
    for other in (by_kernel(**inputs, mode=mode), recorded(**inputs, mode=mode)):
        for x, y in zip(other, wanted, strict=True):
            assert x.dtype == dtype
            # the kernel's cosines on three axes are 8e-7 off, and heads here reach 5
            atol, rtol = (4e-6, 0) if dtype == torch.float32 else [2 * torch.finfo(dtype).eps] * 2
            torch.testing.assert_close(x, y, atol=atol, rtol=rtol)


def test_the_order_of_hugging_face_is_known_even_where_all_sizes_agree():
    rope, text = Rotary(24), torch.arange(3.0).expand(3, 3, 3)  # (a, b, s)
    q = torch.randn(3, 3, 2, 24)
    with pytest.raises(ValueError, match=r"\(a, b, s\), not \(b, s, a\).*permute\(1, 2, 0\)"):
        rope(q, q, text)
    torch.testing.assert_close(rope(q, q, text.permute(1, 2, 0)), rope(q, q, rope.place("text:3")[0]))


def test_whole_numbers_and_float64_reach_beyond_what_float32_counts():
    q = torch.randn(1, 2, 1, 8)
    far = torch.tensor([[2**24 + 1], [2**24 + 3]])
    whole, real = (rotate(q, None, p, torch.ones(1, 4))[0] for p in (far, far.double()))
    assert torch.equal(whole, real)
    assert not torch.equal(whole, rotate(q, None, far - 1, torch.ones(1, 4))[0])


@pytest.mark.parametrize("power", [24, 26, 30, 34, 38])
def test_every_path_rotates_far_tokens_by_their_angle(power):
    far = (2**power + 3 * torch.arange(S))[:, None]
    q, omega = torch.randn(1, S, 1, 8), torch.tensor([[1.0, 0.3, 0.01, 1e-4]])
    with mpmath.workdps(50):
        exact = [
            [float(mpmath.fmod(int(n) * mpmath.mpf(w), 2 * mpmath.pi)) for w in omega[0].tolist()]
            for n in far
        ]
    wanted = rotate_by_angles(q, None, torch.tensor(exact, dtype=torch.float64))[0]
    # the words of the kernel have 48 bits, and 2**40 radians of these are whole
    bound = max(2e-6, 2.0 ** (power - 46))
    for positions in (far, far.double()):
        torch.testing.assert_close(rotate(q, None, positions, omega)[0], wanted, atol=bound, rtol=0)
        torch.testing.assert_close(by_kernel(q, q, positions, omega)[0], wanted, atol=bound, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cos": torch.ones(3, S, D)}, "cos and sin must be"),
        ({"cos": torch.ones(1, S, D + 2), "sin": torch.ones(1, S, D + 2)}, "of the d channels"),
        ({"cos": torch.ones(1, S, D).int()}, "give tables of floating point numbers"),
        ({"cos": [1.0]}, "cos is a list"),
        ({"cos": torch.full((1, S, D), torch.nan)}, "cos or sin holds NaN or infinity"),
        ({"sin": torch.full((1, S, D), torch.inf)}, "cos or sin holds NaN or infinity"),
        ({"k": torch.ones(B, S - 1, G, D)}, "alike but for the heads"),
        ({"pairing": "block"}, "sum to the 8 pairs"),
        ({"tail": "no"}, "tail is 'no'; give True"),
    ],
)
def test_tables_that_do_not_fit_are_refused_alike(change, words):
    kernel = pytest.importorskip("rope_mm_kernels.table").rotate_by_table
    fit = {"q": FIT["q"], "k": FIT["k"], "cos": torch.ones(1, S, D), "sin": torch.ones(1, S, D)}
    eager = {"eager": rotate_by_table, "kernel": kernel}
    paths = eager | {f"compiled, {way}": when_compiled(function) for way, function in eager.items()}
    said = refusals(paths, words, **{**fit, **change})
    assert len(said) == 4 and len(set(said.values())) == 1, said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"angles": torch.ones(S + 1, R)}, "angles .* must be"),
        ({"angles": torch.ones(B + 1, S, R)}, "angles .* must be"),
        ({"angles": torch.ones(R)}, "angles .* must be"),
        ({"angles": torch.ones(S, R + 1)}, "9 pairs need 18 channels"),
        ({"angles": torch.ones(B, S, 3, R)}, "Omega has 3 heads"),
        ({"angles": torch.ones(S, R).half()}, "in float32 or float64"),
        ({"angles": torch.full((S, R), torch.nan)}, "NaN or infinity"),
        ({"pairing": "thirds"}, "pairing 'thirds' is unknown"),
        ({"tail": "no"}, "tail is 'no'; give True"),
        ({"angles": torch.full((S, R), 2.0**25)}, r"in float32 are not exact past 2\*\*24 radians"),
        ({"angles": torch.full((S, R), 2.0**41).double()}, r"past 2\*\*40 radians"),
    ],
)
def test_angles_that_do_not_fit_are_refused_alike(change, words):
    kernel = pytest.importorskip("rope_mm_kernels.rotary").rotate_by_angles
    fit = {"q": FIT["q"], "k": FIT["k"], "angles": torch.ones(S, R)}
    eager = {"eager": rotate_by_angles, "kernel": kernel}
    paths = eager | {f"compiled, {way}": when_compiled(function) for way, function in eager.items()}
    said = refusals(paths, words, **{**fit, **change})
    assert len(said) == 4 and len(set(said.values())) == 1, said


def test_in_place_refuses_what_it_would_corrupt():
    q, k, positions, omega = FIT.values()
    with pytest.raises(ValueError, match="leaf that requires grad"):
        rotate_(q.clone().requires_grad_(), k.clone(), positions, omega)
    with pytest.raises(ValueError, match="one element stands for many"):
        rotate_(q[:, :, :1].expand_as(q), k.clone(), positions, omega)


@pytest.mark.parametrize("factor", [0.0, -1.0, torch.nan, torch.inf])
def test_a_compiled_rotation_refuses_a_factor_that_none_has(factor):
    compiled = torch.compile(rotate, backend="eager")
    with pytest.raises(ValueError, match="give a finite number > 0"):
        compiled(**FIT, factor=factor)


def test_positions_of_hugging_face_are_named_where_heads_are_as_many_as_tokens_there():
    q, omega = torch.randn(4, 3, 4, 8), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"Hugging Face's order \(a, b, s\): give positions.permute"):
        rotate(q, q, torch.arange(3.0).expand(3, 4, 3), omega)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "float32"])
def test_angles_and_tables_are_of_no_dtype_that_heads_cannot_have(dtype):
    rope, positions = Rotary(24), torch.zeros(2, 3)
    for make in (rope.angles, rope.cos_sin):
        with pytest.raises(ValueError, match="give that of the heads: "):
            make(positions, dtype)


def test_numbers_of_numpy_are_taken_as_numbers():
    assert torch.equal(Rotary(np.int64(24), heads=np.int64(2)).omega, Rotary(24, heads=2).omega)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_nested_heads_sparse_tables_and_specs_that_are_none_are_refused():
    rows = [torch.ones(3, H, D), torch.ones(5, H, D)]
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(rows, layout=layout)
        with pytest.raises(ValueError, match="q is a sparse or nested tensor"):
            rotate(nested, nested, FIT["positions"], FIT["omega"])
    table = torch.ones(1, S, D)
    for cos, words in (
        (table.to_sparse(), "cos is a sparse"),
        (table.to("meta"), "cos is on the meta"),
        (table.to(torch.float8_e4m3fn), "cos is torch.float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=words):
            rotate_by_table(FIT["q"], FIT["k"], cos, table)
    with pytest.raises(ValueError, match="angles is on the meta device"):
        rotate_by_angles(FIT["q"], FIT["k"], torch.ones(S, R, device="meta"))
    for spec in (None, 2, {}):
        with pytest.raises(ValueError, match=r"pairing .* is unknown"):
            make_angles(FIT["positions"], FIT["omega"], spec)
