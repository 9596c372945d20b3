"""What a rotation takes and what it refuses: one list for every path.

The definition, compiled graphs and the kernels all refuse by this list. It needs torch alone, so that it also
serves where triton is not installed.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingImports]

HEAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OMEGA_DTYPES = (torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
POSITION_DTYPES = (*INTEGERS, *OMEGA_DTYPES)
PAIRINGS = ("half", "interleaved", "block")
MODES = ("exact", "hf")
FARTHEST = 2**24  # beyond it float32 cannot count by one
FARTHEST_WIDE = 2**53  # beyond it float64 cannot either
FASTEST = 2**40  # radians beyond which the kernel's angles are further off than bfloat16 rounds

FINITE_POSITIONS = "positions hold NaN or infinity; every token needs a finite position"
FINITE_OMEGA = "Omega holds NaN or infinity; every pair needs finite radians per step"
FINITE_ANGLES = "angles hold NaN or infinity; every token needs finite angles"
FINITE_TABLES = "cos or sin holds NaN or infinity; every token needs finite tables"
NEAR_FLOAT32 = "positions in float32 cannot count past 2**24; give them in float64 or as whole numbers"
NEAR_FLOAT64 = "positions cannot be counted past 2**53; give smaller ones, counted from another start"
NARROW_ANGLES = "angles in float32 are not exact past 2**24 radians; give them in float64 or mod 2 pi"
NEAR_ANGLES = "angles past 2**40 radians are not exact; give smaller positions, counted from another start"
# a copy of this package under another name, as the Kernel Hub makes, has ops of its own
PACKAGE = __name__.partition(".")[0]
NAMESPACE = "rope_mm" if PACKAGE == "rope_mm_kernels" else f"rope_mm_{PACKAGE}"
IS_EXPORTING = getattr(
    torch.compiler, "is_exporting", None
)  # torch 2.6 has none: all graphs are taken as exported


def shape_of(x: Tensor) -> str:
    """The shape of a tensor as messages print it."""
    return str(tuple(x.shape))


def check_tensors(**tensors: object) -> None:
    """Refuse lists, arrays and numbers where a tensor is meant, and tensors that are not dense."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; give a tensor, torch.as_tensor({name})")
        if x.layout != torch.strided or x.is_nested:
            raise ValueError(f"{name} is a sparse or nested tensor; give a dense one, such as a padded batch")


def check_numbers(q: Tensor, **tensors: Tensor) -> None:
    """Refuse tensors without numbers, on the meta device, for heads q that have some."""
    for name, x in tensors.items():
        if x.is_meta and not q.is_meta:
            raise ValueError(
                f"{name} is on the meta device, without numbers, and q on {q.device}; give both there"
            )


def check_choice(kind: str, given: object, known: Sequence[str]) -> None:
    """Refuse an unknown pairing or mode, with the nearest known one."""
    if given in known:
        return
    near = difflib.get_close_matches(str(given), known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{kind} {given!r} is unknown; {hint}It is one of {', '.join(map(repr, known))}")


def check_heads(q: Tensor, k: Tensor) -> None:
    """Refuse q (b, s, h, d) and k (b, s, g, d) of other dtypes or shapes, or spread over processes."""
    check_tensors(q=q, k=k)
    # a DTensor is known by this method: to import the class would cost a second
    if hasattr(q, "full_tensor") or hasattr(k, "full_tensor"):
        raise ValueError(
            "q or k is a DTensor, but every process rotates its own heads; give `to_local()` of both and, "
            "of an Omega per head, the rows of these heads"
        )
    if q.dtype not in HEAD_DTYPES:
        raise ValueError(
            f"heads are {q.dtype}, but bfloat16, float16, float32 or float64 are rotated; convert them"
        )
    if q.dtype != k.dtype:
        raise ValueError(f"q is {q.dtype} and k is {k.dtype}; give both in one dtype")
    if q.device != k.device:
        raise ValueError(f"q is on {q.device} and k on {k.device}; give both on one device")
    one, other = q.shape, k.shape  # compared one by one: slices would take most of the time of this function
    fits = len(one) == len(other) == 4
    if not fits or one[0] != other[0] or one[1] != other[1] or one[3] != other[3]:
        shapes = f"{shape_of(q)} and {shape_of(k)}"
        swapped = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
        hint = ". These look like (b, heads, s, d): give q.transpose(1, 2) and k.transpose(1, 2)" * swapped
        raise ValueError(f"q and k must be (b, s, heads, d), alike but for the heads, not {shapes}{hint}")


def check_head_dtype(dtype: object) -> None:
    """Refuse a dtype that no heads and no tables have."""
    if dtype not in HEAD_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; give that of the heads: {', '.join(map(str, HEAD_DTYPES))}")


def check_omega(omega: Tensor) -> None:
    """Refuse an Omega that is not (a, r) or (n, a, r) in float32 or float64."""
    check_tensors(omega=omega)
    if omega.dim() not in (2, 3) or not omega.numel():
        raise ValueError(f"Omega must be (a, r) or (heads, a, r) and not empty, but is {shape_of(omega)}")
    if omega.dtype not in OMEGA_DTYPES:
        raise ValueError(f"Omega is {omega.dtype}, which loses angles; keep it in float32 or float64")


def check_positions(positions: Tensor, omega: Tensor) -> None:
    """Refuse positions that are not (s, a) or (b, s, a), and positions and Omega whose numbers do not fit."""
    check_omega(omega)
    check_tensors(positions=positions)
    a = omega.shape[-2]
    if positions.dim() not in (2, 3) or positions.shape[-1] != a:
        swapped = positions.dim() == 3 and positions.shape[0] == a
        hint = ". These look like Hugging Face's order (a, b, s): give positions.permute(1, 2, 0)" * swapped
        raise ValueError(
            f"positions {shape_of(positions)} must be (s, a) or (b, s, a), "
            f"with the a = {a} axes of Omega{hint}"
        )
    if positions.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"positions in {positions.dtype} cannot count past 256 or 2048; give whole numbers, float32 or "
            "float64 (FSDP casts a module's inputs unless cast_forward_inputs=False)"
        )
    if positions.dtype not in POSITION_DTYPES:
        raise ValueError(f"positions are {positions.dtype}; give whole numbers, float32 or float64")
    check_values("positions", positions, omega)


def has_readable_values(x: Tensor) -> bool:
    """Whether the host may look at the numbers: an accelerator would make it wait, a traced graph cannot."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not is_functorch_wrapped_tensor(x)
        and not torch._C._len_torch_dispatch_stack()
    )


def largest(x: Tensor) -> float:
    """The largest absolute value, 0 of no numbers; NaN or infinity where any number is."""
    if not x.numel():
        return 0.0
    low, high = (float(end) for end in x.detach().aminmax())  # one pass; a NaN is both of its results
    return max(abs(low), abs(high)) if low == low else low


def check_values(rule: str, *tensors: Tensor) -> None:
    """Refuse tensors whose numbers a rule of VALUES refuses.

    On a CPU alone: elsewhere the host would wait for the numbers. A compiled graph looks when it runs, by the
    same rule; an exported one, which runs without Python, asserts the rule's conditions.
    """
    if not torch.compiler.is_compiling():
        if all(map(has_readable_values, tensors)):
            VALUES[rule].refuse(*tensors)
    elif any(x.device.type != "cpu" for x in tensors):
        return
    elif IS_EXPORTING is not None and not IS_EXPORTING():
        answer = check_values_op([x.detach() for x in tensors], rule)
        torch._assert_async(answer, rule)  # keeps the op in the graph
    else:
        for holds, message in VALUES[rule].conditions(*(x.detach() for x in tensors)):
            torch._assert_async(holds.all(), message)


@torch.library.custom_op(f"{NAMESPACE}::check_values", mutates_args=())
def check_values_op(tensors: Sequence[Tensor], rule: str) -> Tensor:
    """A rule of VALUES as an op, so that a compiled graph refuses by the same list when it runs."""
    VALUES[rule].refuse(*tensors)
    return torch.ones((), dtype=torch.bool)


@check_values_op.register_fake
def make_fake_answer(tensors: Sequence[Tensor], rule: str) -> Tensor:
    """The shape of the answer of `check_values_op`."""
    return tensors[0].new_empty((), dtype=torch.bool)


def refuse_positions(positions: Tensor, omega: Tensor) -> None:
    """Refuse numbers that are not finite or too far for their dtype, and positions in another order.

    Raises:
        ValueError: in one sentence.
    """
    farthest, fastest = largest(positions), largest(omega)
    if not math.isfinite(fastest):
        raise ValueError(FINITE_OMEGA)
    if not math.isfinite(farthest):
        raise ValueError(FINITE_POSITIONS)
    if positions.dtype == torch.float32 and farthest > FARTHEST:
        raise ValueError(NEAR_FLOAT32)
    if farthest > FARTHEST_WIDE:
        raise ValueError(NEAR_FLOAT64)
    if farthest * fastest > FASTEST:
        raise ValueError(NEAR_ANGLES)
    cube = positions.dim() == 3 and positions.shape[0] == positions.shape[1] == positions.shape[2] > 1
    # three rows of three tokens on three axes fit both orders; in ours no token counts up over its axes
    if cube and (positions.diff(dim=-1) == 1).all():
        raise ValueError(
            f"positions {shape_of(positions)} hold Hugging Face's order (a, b, s), not (b, s, a): "
            "give positions.permute(1, 2, 0)"
        )


def conditions_of_positions(positions: Tensor, omega: Tensor) -> list[tuple[Tensor, str]]:
    """What `refuse_positions` asks of numbers, of which NaN is none."""
    # 2**53 is no number of a narrow whole dtype
    narrow, far = positions.dtype == torch.float32, positions.double().abs()
    counted = f"{FINITE_POSITIONS}; {NEAR_FLOAT32}" if narrow else f"{FINITE_POSITIONS}; {NEAR_FLOAT64}"
    return [
        (omega.isfinite(), FINITE_OMEGA),
        (far <= (FARTHEST if narrow else FARTHEST_WIDE), counted),
        (far * omega.double().abs().amax() <= FASTEST, NEAR_ANGLES),
    ]


def refuse_angles(angle: Tensor) -> None:
    """Refuse angles that are not finite or too large for their dtype.

    Raises:
        ValueError: in one sentence.
    """
    farthest = largest(angle)
    if not math.isfinite(farthest):
        raise ValueError(FINITE_ANGLES)
    if angle.dtype == torch.float32 and farthest > FARTHEST:
        raise ValueError(NARROW_ANGLES)
    if farthest > FASTEST:
        raise ValueError(NEAR_ANGLES)


def conditions_of_angles(angle: Tensor) -> list[tuple[Tensor, str]]:
    """What `refuse_angles` asks of numbers, of which NaN is none."""
    narrow = angle.dtype == torch.float32
    near = f"{FINITE_ANGLES}; {NARROW_ANGLES if narrow else NEAR_ANGLES}"
    return [(angle.abs() <= (FARTHEST if narrow else FASTEST), near)]


def refuse_tables(cos: Tensor, sin: Tensor) -> None:
    """Refuse cosines and sines that are not finite.

    Raises:
        ValueError: in one sentence.
    """
    if not (math.isfinite(largest(cos)) and math.isfinite(largest(sin))):
        raise ValueError(FINITE_TABLES)


def conditions_of_tables(cos: Tensor, sin: Tensor) -> list[tuple[Tensor, str]]:
    """What `refuse_tables` asks of numbers."""
    return [(x.isfinite(), FINITE_TABLES) for x in (cos, sin)]


class ValueRule(NamedTuple):
    """Which numbers are refused.

    Attributes:
        refuse: raises ValueError for tensors that the host can read.
        conditions: what holds for all numbers that are not refused, and the message where it does not.
    """

    refuse: Callable[..., None]
    conditions: Callable[..., list[tuple[Tensor, str]]]


VALUES = {
    "positions": ValueRule(refuse_positions, conditions_of_positions),
    "angles": ValueRule(refuse_angles, conditions_of_angles),
    "tables": ValueRule(refuse_tables, conditions_of_tables),
}


def check_spec(
    pairing: str, blocks: Sequence[int], factor: float = 1.0, mode: str = "exact", tail: bool = False
) -> None:
    """Refuse an unknown pairing or mode, blocks of another pairing, a factor or tail that no rotation has."""
    check_choice("pairing", pairing, PAIRINGS)
    check_choice("mode", mode, MODES)
    check_blocks(blocks)
    if blocks and pairing != "block":
        raise ValueError(f"blocks {blocks} belong to pairing 'block'; omit them with {pairing!r}")
    if not isinstance(tail, bool):
        raise ValueError(f"tail is {tail!r}; give True, to rotate the last channels of a head, or False")
    if not is_factor(factor):
        raise ValueError(f"factor is {factor}; give a finite number > 0, in float32 no 0 and no infinity")


def is_factor(factor: Any) -> bool:
    """Whether cosine and sine can be multiplied by it."""
    if isinstance(factor, bool) or not isinstance(factor, Real):
        return False
    # written out: by names of numbers a graph would be traced again; squares of these are float32's, too
    return 2.0**-60 <= factor <= 2.0**60  # pyright: ignore[reportOperatorIssue]


def check_blocks(blocks: Sequence[int]) -> None:
    """Refuse blocks of pairs that are not whole numbers."""
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or not all(map(is_whole, blocks)):
        raise ValueError(f"blocks are {blocks!r}; give a tuple of whole numbers, the pairs of each block")


def is_whole(number: object) -> bool:
    """Whether it is a whole number, also one of numpy."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def check_pairs(x: Tensor, n: int, r: int, pairing: str, blocks: Sequence[int]) -> None:
    """Refuse heads x (b, s, h, d) too small for r pairs, n that does not divide h, blocks without sum r."""
    h, d = x.shape[-2:]
    if 2 * r > d:
        raise ValueError(f"{r} pairs need {2 * r} channels, but a head has {d}; take a smaller Omega")
    if h % n:
        raise ValueError(f"Omega has {n} heads, which must divide the {h} heads of q and of k")
    if pairing == "block" and (sum(blocks) != r or min(blocks) < 1):
        raise ValueError(f"blocks {tuple(blocks)} must be positive and sum to the {r} pairs of Omega")


def check_tokens(x: Tensor, positions: Tensor) -> None:
    """Refuse positions (s, a) or (b, s, a) of other tokens or rows than those of heads x (b, s, h, d)."""
    if positions.shape[-2] == x.shape[1] and (positions.dim() == 2 or len(positions) in (1, len(x))):
        return
    message = f"positions {shape_of(positions)} do not fit q {shape_of(x)}"
    (b, s, h, _), a = x.shape, positions.shape[-1]
    if tuple(positions.shape) == (a, b, s):
        raise ValueError(
            f"{message}; these look like Hugging Face's order (a, b, s): give positions.permute(1, 2, 0)"
        )
    if positions.shape[-2] == h:
        raise ValueError(f"{message}, which looks like (b, heads, s, d); give q.transpose(1, 2), so too k")
    raise ValueError(f"{message}; give one position for each token, (s, a) or (b, s, a)")


def check_rotation(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    omega: Tensor,
    pairing: str = "half",
    blocks: Sequence[int] = (),
    factor: float = 1,  # whole: a graph would be traced again to compare a default of 1.0
    mode: str = "exact",
    tail: bool = False,
) -> None:
    """Refuse what does not fit together, before anything is computed.

    Args:
        q: queries (b, s, h, d).
        k: keys (b, s, g, d).
        positions: (s, a) or (b, s, a).
        omega: (a, r) or (n, a, r), n dividing h and g.
        pairing: a key of PAIRINGS.
        blocks: pairs in each block, for "block".
        factor: what cosine and sine are multiplied by.
        mode: a key of MODES.
        tail: whether the last 2r channels are rotated, not the first.

    Raises:
        ValueError: what is refused, in one sentence.
    """
    check_heads(q, k)
    check_spec(pairing, blocks, factor, mode, tail)
    check_positions(positions, omega)
    check_numbers(q, positions=positions, omega=omega)
    check_tokens(q, positions)
    n = omega.shape[0] if omega.dim() == 3 else 1
    for x in (q, k):
        check_pairs(x, n, omega.shape[-1], pairing, blocks)


def check_tables(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse tables that are not (1 or b, s, 2r) for heads q (b, s, h, d)."""
    check_tensors(cos=cos, sin=sin)
    (b, s, _, d), width = q.shape, cos.shape[-1] if cos.dim() else 0
    fits = cos.shape == sin.shape and tuple(cos.shape[:-1]) in ((1, s), (b, s))
    if not fits or width > d or width % 2 or not width:
        shapes = f"cos {shape_of(cos)}, sin {shape_of(sin)}, q {shape_of(q)}"
        raise ValueError(
            f"cos and sin must be (1, s, 2r) or (b, s, 2r) with 2r of the d channels of q: {shapes}"
        )
    check_numbers(q, cos=cos, sin=sin)
    if cos.dtype not in HEAD_DTYPES or sin.dtype not in HEAD_DTYPES:
        raise ValueError(f"cos is {cos.dtype} and sin {sin.dtype}; give tables of floating point numbers")
    check_values("tables", cos, sin)


def check_table_rotation(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairing: str,
    blocks: Sequence[int],
    tail: bool = False,
) -> None:
    """Refuse what does not fit together for q (b, s, h, d) and k (b, s, g, d) rotated by given tables."""
    check_heads(q, k)
    check_spec(pairing, blocks, tail=tail)
    check_tables(q, cos, sin)
    for x in (q, k):
        check_pairs(x, 1, cos.shape[-1] // 2, pairing, blocks)


def check_angles(q: Tensor, angle: Tensor) -> None:
    """Refuse angles that are not (s, r), (b, s, r) or (b, s, n, r), of floats, for q (b, s, h, d)."""
    check_tensors(angles=angle)
    check_numbers(q, angles=angle)
    if angle.dtype not in OMEGA_DTYPES:
        raise ValueError(f"angles are {angle.dtype}; give radians in float32 or float64")
    b, s = q.shape[:2]
    rows = angle.shape[:-1] if angle.dim() < 4 else angle.shape[:2]
    if angle.dim() not in (2, 3, 4) or tuple(rows) not in ((s,), (1, s), (b, s)) or not angle.shape[-1]:
        raise ValueError(
            f"angles {shape_of(angle)} must be (s, r), (b, s, r) or (b, s, heads, r) for q {shape_of(q)}"
        )
    check_values("angles", angle)


def check_angle_rotation(
    q: Tensor,
    k: Tensor,
    angle: Tensor,
    pairing: str,
    blocks: Sequence[int],
    factor: float,
    tail: bool = False,
) -> None:
    """Refuse what does not fit together for q (b, s, h, d) and k (b, s, g, d) rotated by given angles."""
    check_heads(q, k)
    check_spec(pairing, blocks, factor, tail=tail)
    check_angles(q, angle)
    for x in (q, k):
        check_pairs(x, angle.shape[2] if angle.dim() == 4 else 1, angle.shape[-1], pairing, blocks)
