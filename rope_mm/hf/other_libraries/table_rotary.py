"""Models of diffusers and timm: what they rotate by, and a scheme in its place.

Such a model makes tables of cosine and sine once in a forward and hands them to every block. So the
one thing that is replaced is what makes the tables; blocks, processors and attention backends stay.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rope_mm.checks.arguments import bind_positional
from rope_mm.hf.build_rotary import read_given, refuse
from rope_mm.hf.cos_sin_tables import TABLE_FORMATS, fill_tables
from rope_mm.hf.other_libraries.diffusers_attention import (
    AttentionRotary,
    is_bare,
    make_attention_rotary,
    save_scheme,
    saved_scheme,
)
from rope_mm.hf.other_libraries.diffusers_families import FAMILIES, Family
from rope_mm.hf.other_libraries.timm_families import TIMM_FAMILIES
from rope_mm.hf.rotary_embedding import Changes
from rope_mm.rotary import definition
from rope_mm.rotary.dispatch import RotarySpec
from rope_mm.rotary.module import Rotary
from rope_mm.schemes.scheme import Scheme

# Omega and angles: both in float64; angles rounded to float32; all in float32
ARITHMETIC = "float64", "rounded", "float32"
ULPS = 16  # how far a model's float32 frequency may be from ours: its powers are made in float32, too
CLOSE = 1e-4  # what tables may differ by where no arithmetic gives them bit for bit


@dataclass(frozen=True)
class TableRope:
    """What a model of diffusers or timm rotates by: cosine and sine of positions @ omega.

    Attributes:
        scheme: ours with the same Omega; its layout's axes are those of the model's own positions.
        omega: radians per step (a, r), the model's own numbers; r counts the pairs of all heads where one
            table runs over them.
        arithmetic: how the model rounds, a key of ARITHMETIC.
        error: by how much its tables differ from these; 0 bit for bit.
        cast: the dtype to which `.to(dtype)` has cast the model's tables; None where they are as made.
    """

    scheme: Scheme
    omega: tuple[tuple[float, ...], ...]
    arithmetic: str
    error: float
    cast: torch.dtype | None = None

    @property
    def pairing(self) -> str:
        """The channels that are rotated together."""
        return self.scheme.pairing

    @property
    def pairs(self) -> int:
        """How many pairs of channels are rotated."""
        return len(self.omega[0])

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of its positions."""
        return self.scheme.axes

    @property
    def spec(self) -> RotarySpec:
        """How angles rotate channels."""
        return RotarySpec(self.pairing)

    def angles(self, positions: Tensor) -> Tensor:
        """Radians (..., s, 1, r) at positions (..., s, a), rounded as the model does."""
        kind = torch.float32 if self.arithmetic == "float32" else definition.widest_float(positions.device)
        omega = torch.tensor(self.omega, device=positions.device, dtype=kind)
        angle: Any = sum(positions[..., axis, None].to(kind) * row for axis, row in enumerate(omega))
        return (angle.float() if self.arithmetic == "rounded" else angle)[..., None, :]


@dataclass(frozen=True)
class TableSlot:
    """Where a model makes its tables.

    Attributes:
        model: the model.
        name: of the part that makes them, "" for a pipeline that hands them to the model.
        part: that part, or the model.
        family: how it is called.
    """

    model: Any
    name: str
    part: Any
    family: Family

    @property
    def table_format(self) -> str:
        """How angles fill its tables."""
        given = self.family.table_format
        return given if isinstance(given, str) else given(self.part)

    @property
    def heads(self) -> int:
        """Over how many heads one table runs."""
        return self.model.config.num_attention_heads if self.family.wide else 1

    def original(self, *args: Any) -> Any:
        """The tables that the model makes by itself."""
        family = self.family
        if family.tables:
            return family.tables(self.part, *args)
        return (getattr(self.part, family.leaf) if family.leaf else self.part)(*args)

    def answer(self, rope: Any, own: bool, *args: Any, **kwargs: Any) -> Any:
        """The tables of a rope for one call, as the model's own part returns them."""
        family = self.family
        p = family.positions(self.part, rope.scheme, own, *args, **kwargs)
        if isinstance(rope, TableRope):
            angle = rope.angles(p)
        else:
            angle = definition.angles(p, torch.as_tensor(rope.omega))
            angle = angle.expand(*angle.shape[:-2], self.heads, -1)
        tables = fill_tables(angle.flatten(-2), self.table_format, rope.spec.factor)
        if isinstance(rope, TableRope) and rope.cast:
            tables = tuple(table.to(rope.cast) for table in tables)
        return family.pack(tables, self.part, *args, **kwargs)


PACKAGES = "diffusers.", "timm."


def makes_tables(model: Any) -> bool:
    """Whether an object is a model of diffusers or timm, which are not imported for that."""
    kinds = type(model).__mro__
    return isinstance(model, nn.Module) and any(kind.__module__.startswith(PACKAGES) for kind in kinds)


def rotary_places(model: Any) -> Iterator[tuple[str, Any, Family]]:
    """Names, objects and families of what makes a model's tables: itself, a child or a plain attribute."""
    families = FAMILIES | TIMM_FAMILIES
    for name, part in (("", model), *model.named_children(), *vars(model).items()):
        kind = f"{type(part).__module__.rpartition('.')[2]}.{type(part).__name__}"
        if kind in families:
            yield name, part, families[kind]


def slot_of(model: Any) -> TableSlot:
    """Where a model makes its tables.

    Raises:
        ValueError: a model with no part or with several parts of a class that is known.
    """
    found, name = list(rotary_places(model)), type(model).__name__
    if len(found) != 1:
        unknown = sorted({type(part).__name__ for part in parts_that_rotate(model)})
        has = f"rotates by {', '.join(unknown)}" if unknown else "has no part that is known to make tables"
        raise ValueError(
            f"{name} {has}, and is not served; docs/models.md names the models of diffusers and timm that are"
        )
    return TableSlot(model, *found[0])


def parts_that_rotate(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose class's name speaks of a rotation."""
    words = "rotary", "rope", "embednd", "posembed"
    for part in model.modules():
        name = type(part).__name__.lower()
        if "attention" not in name and any(word in name for word in words):
            yield part


def tensors_of(tables: Any) -> list[Tensor]:
    """The tensors in tables of any structure, complex numbers as two real ones."""
    parts = [x if x.is_meta else x.cpu() for x in tree_leaves(tables)]
    return [torch.view_as_real(x).movedim(-1, 0) if x.is_complex() else x for x in parts]


def read_rope(slot: TableSlot) -> TableRope:
    """What a model rotates by: our scheme of its family, with the numbers that give its tables bit for bit.

    Raises:
        ValueError: tables that the scheme does not give.
    """
    name = type(slot.part).__name__
    try:
        scheme = slot.family.scheme(slot.part, getattr(slot.model, "config", None))
        calls = [(args, slot.original(*args)) for args in slot.family.examples(slot.part)]
        lost = any(x.is_meta for _, tables in calls for x in tensors_of(tables))
        refuse({f"{name} has tables on the meta device; load the weights first": lost})
        return closest_rope(slot, scheme, calls)
    except (RuntimeError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{name} does not answer as in the versions that are known "
            f"({type(error).__name__}: {error}); it is not served"
        ) from error


def closest_rope(slot: TableSlot, scheme: Scheme, calls: list[tuple[tuple, Any]]) -> TableRope:
    """The arithmetic and the float32 numbers that give an original's tables, bit for bit where some do."""
    table, *_ = tree_leaves(calls[0][1])
    r = table.shape[-1] // slot.family.columns // slot.heads
    cast = table.dtype if table.dtype in (torch.bfloat16, torch.float16) else None
    heads = slot.heads if scheme.per_head else None
    omega = scheme.omega(2 * r, heads)
    exact = omega.movedim(0, 1).flatten(1) if heads else omega
    best, error = None, math.inf
    for arithmetic in ARITHMETIC:
        if error == 0:
            break
        rope = TableRope(scheme, as_tuples(exact), arithmetic, 0.0, cast)
        if arithmetic == "float32":
            rope = replace(rope, omega=as_tuples(fit_float32(slot, rope, exact, calls)))
        pairs = [pair for args, tables in calls for pair in compared(slot, rope, args, tables)]
        off = max((ours.double() - theirs.double()).abs().max().item() for ours, theirs in pairs)
        if off < error:
            best, error = replace(rope, error=off), off
    if best is None or error > CLOSE:
        raise ValueError(
            f"{type(slot.part).__name__} makes tables that differ by {error:.1e} from those of {scheme}; it "
            "is not served"
        )
    return best


def as_tuples(omega: Tensor) -> tuple[tuple[float, ...], ...]:
    """The numbers of an Omega (a, r)."""
    return tuple(map(tuple, omega.tolist()))


def compared(slot: TableSlot, rope: TableRope, args: tuple, tables: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Our tables beside a model's own, in one structure.

    Raises:
        ValueError: tables of another structure, shape or dtype.
    """
    ours, theirs = (tensors_of(x) for x in (slot.answer(rope, True, *args), tables))
    alike = [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]
    refuse({f"{type(slot.part).__name__} returns tables of another shape than is known": not alike})
    yield from zip(ours, theirs, strict=True)


def fit_float32(slot: TableSlot, rope: TableRope, exact: Tensor, calls: list[tuple[tuple, Any]]) -> Tensor:
    """The float32 numbers near an Omega (a, r) whose tables are a model's own; the nearest where none are."""
    nearest, pairs = exact.float(), torch.arange(exact.shape[1])
    pair_of_channel = TABLE_FORMATS[slot.table_format](pairs, pairs, (len(pairs),))
    pair_of_channel = pair_of_channel.repeat(max(1, slot.family.columns // 2))
    fitted, open_pairs = nearest.clone(), torch.ones(len(pairs), dtype=torch.bool)
    for step in sorted(range(-ULPS, ULPS + 1), key=abs):
        numbers = (nearest.view(torch.int32) + step).view(torch.float32).where(nearest != 0, nearest)
        rope = replace(rope, omega=as_tuples(numbers))
        wrong = torch.zeros(len(pairs), dtype=torch.long)
        for args, tables in calls:
            for ours, theirs in compared(slot, rope, args, tables):
                off = (ours != theirs).flatten(0, -2).any(0)
                wrong.index_add_(0, pair_of_channel, off.long())
        fits = open_pairs & (wrong == 0)
        fitted[:, fits], open_pairs = numbers[:, fits], open_pairs & ~fits
        if not open_pairs.any():
            break
    return fitted


class TableRotary(nn.Module, Changes):
    """What makes a model's tables by a scheme, beside the model's own part, which stays where it is.

    A child of the model, so that a learned Omega is in the model's parameters and moves with them.

    Attributes:
        ropes: what it runs, under the key None.
        own: whether the scheme's layout is the model's, so that positions are those of model and pipeline.
        calls: how often tables were made in the forward that is under way.
        undo: calls that, the last one first, make the model what it was.
    """

    def __init__(self, slot: TableSlot, rope: Any, read: TableRope):
        nn.Module.__init__(self)
        self.undo = []
        self.ropes = {None: rope}
        self.learned = nn.ModuleList([rope] if isinstance(rope, Rotary) else [])
        self.places = (slot,)  # in a tuple, which hides the model from its child
        layout, mine = (
            scheme and (scheme.layout, dict(scheme.options)) for scheme in (rope.scheme, read.scheme)
        )
        self.own, self.read, self.calls = layout == mine, read, 0

    @property
    def rope(self) -> Any:
        """What it runs."""
        return self.ropes[None]

    @property
    def slot(self) -> TableSlot:
        """Where it stands."""
        return self.places[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.slot.answer(self.rope, self.own, *args, **kwargs)

    def install(self) -> None:
        """Make tables in the place of the model's own part, and watch its forward."""
        model, family = self.slot.model, self.slot.family
        self.set_attr(model, "rope_mm", self)
        save_scheme(model, self.rope, self)
        if not family.tables:
            holder, leaf = (self.slot.part, family.leaf) if family.leaf else (model, self.slot.name)
            self.set_attr(holder, leaf, self.make_tables)
        self.undo.append(model.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True).remove)
        self.undo.append(model.register_forward_hook(self.after).remove)

    def make_tables(self, *args: Any, **kwargs: Any) -> Any:
        """What the model calls in the place of its own part."""
        return self.forward(*args, **kwargs)

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before a forward: change the arguments where the pipeline made tables, or positions of its own."""
        self.calls = 0
        family = self.slot.family
        if not family.tables and (self.own or not family.arguments):
            return args, kwargs
        given = bind_positional(model, args, kwargs)
        if family.tables:
            latents, tables = given["hidden_states"], given.get(family.leaf)
            self.check_tables(latents, tables)
            return (), given | {family.leaf: self.forward(latents)}
        assert family.arguments
        return (), given | family.arguments(given, self.rope.scheme)

    def check_tables(self, latents: Tensor, tables: Any) -> None:
        """Refuse tables of a pipeline that are not those of the latents, for their positions would be lost.

        Raises:
            ValueError: no tables, or others.
        """
        slot, name = self.slot, self.slot.family.leaf
        refuse({f"the model was given no {name}, so nothing would be rotated; give what its pipeline makes":
                tables is None})  # fmt: skip
        if torch.compiler.is_compiling():
            return
        pairs = zip(tables, slot.answer(self.read, True, latents), strict=True)
        same = all(
            x.shape == y.shape and torch.allclose(x.float(), y.to(x.device), atol=CLOSE) for x, y in pairs
        )
        refuse({f"{name} is not what {self.read.scheme} gives for these latents, so it holds positions that "
                "set_rope does not know": not same})  # fmt: skip

    def after(self, model: nn.Module, _args: tuple, _out: Any) -> None:
        """After a forward: refuse to let a scheme be without effect.

        Raises:
            ValueError: no tables were asked for.
        """
        calls, self.calls = self.calls, 0
        refuse({f"{type(model).__name__} asked for no tables, so the scheme had no effect": not calls})

    def explain(self) -> str:
        """One line on what runs."""
        placed = "by model and pipeline" if self.own else f"by layout {self.rope.scheme.layout!r}"
        return explain_slot(self.slot, describe_rope(self.rope), placed)

    def extra_repr(self) -> str:
        return describe_rope(self.rope)


def describe_rope(rope: Any) -> str:
    """What runs, in one phrase."""
    if isinstance(rope, Rotary):
        return f"{rope.scheme}, exact angles"
    same = "bit for bit" if rope.error == 0 else f"within {rope.error:.0e}"
    cast = f", tables cast to {rope.cast}" if rope.cast else ""
    return f"the model's own, {same}{cast} ({rope.scheme})"


def make_rope(slot: TableSlot, given: Any, read: TableRope, changes: Mapping[str, Any]) -> Any:
    """What runs: a rope of the model as it was read, or a scheme as a Rotary.

    Raises:
        ValueError: what the model's tables cannot express.
    """
    name, pairs = type(slot.model).__name__, read.pairs // slot.heads
    if isinstance(given, TableRope):
        other = (given.axes, given.pairs, given.pairing) != (read.axes, read.pairs, read.pairing)
        refuse({
            f"this rope was read from another kind of model than {name}; give its scheme": other,
            f"what rope_of read takes no changes, here {sorted(changes)}; give its scheme, "
            f"set_rope(model, rope_of(model).scheme, ...)": changes,
        })  # fmt: skip
        return given
    scheme = read_given(given, changes, name, 2 * pairs, read.pairing)
    check_scheme(slot, scheme, read, name)
    if isinstance(given, Rotary):
        return given
    return Rotary(2 * pairs, scheme, heads=slot.heads if scheme.per_head else None)


def check_scheme(slot: TableSlot, scheme: Scheme, read: TableRope, name: str) -> None:
    """Refuse a scheme that the tables of a model cannot express."""
    pairs = read.pairs // slot.heads
    factor = scheme.attention_scaling
    refuse({
        f"{scheme} has an Omega for each head, but {name} makes one table for all": scheme.per_head
        and not slot.family.wide,
        f"{scheme} has an Omega that depends on the length; give its extension a fixed factor": (
            scheme.needs_length
        ),
        f"fraction {scheme.fraction} leaves channels without a place in the tables of {name}, which rotates "
        f"all {2 * pairs}; take unrotated_fraction": scheme.fraction != 1,
        f"{scheme} multiplies cosine and sine by {factor}, but {name} does not rotate its text, whose scores "
        "would stay as they are; give the extension attention_factor=1": slot.family.unrotated_text
        and factor != 1,
    })  # fmt: skip


def rotary_of(model: Any) -> TableRotary | AttentionRotary | None:
    """Our part of a model of diffusers or timm, None where there is none."""
    return getattr(model, "rope_mm", None)


def no_rotary(model: Any) -> str:
    """What is said of a model that can be given a rotary."""
    return f"{type(model).__name__} has no rotary; give it one by set_rope"


def rope_of_tables(model: Any) -> Any:
    """What a model of diffusers or timm rotates by: a TableRope, or the Rotary that `set_rope` put in."""
    ours = rotary_of(model)
    refuse({no_rotary(model): not ours and is_bare(model)})
    return ours.rope if ours else read_rope(slot_of(model))


def set_table_rope(model: Any, given: Any, changes: dict[str, Any]) -> TableRotary | AttentionRotary:
    """Let a model of diffusers or timm rotate by a scheme.

    Args:
        model: a transformer of diffusers, or an EVA of timm.
        given: as in `set_rope`.
        changes: fields of the scheme to replace.

    Raises:
        ValueError: what the model cannot run, with the reason; the model is as it was.
    """
    name = type(model).__name__
    refuse({f"{name} has a rope of ours already; `unset_rope` it first": rotary_of(model)})
    given = saved_scheme(model) if given is None else given
    if is_bare(model):
        rotary = make_attention_rotary(model, given, changes)
        rotary.train(model.training).install(model)
        return rotary
    slot = slot_of(model)
    holder = slot.part if slot.family.leaf == "forward" else None
    refuse({
        f"something has replaced the forward of {slot.name} already, such as context parallelism or "
        "offloading; call set_rope before it": holder is not None and "forward" in vars(holder)
    })  # fmt: skip
    read = read_rope(slot)
    rotary = TableRotary(slot, make_rope(slot, given, read, changes), read)
    rotary.train(model.training)
    rotary.install()
    return rotary


def explain_tables(model: Any) -> str:
    """One line on what a model of diffusers or timm rotates by, and where its tokens stand."""
    ours = rotary_of(model)
    if ours:
        return ours.explain()
    if is_bare(model):
        return no_rotary(model)
    try:
        return explain_slot(slot_of(model), describe_rope(rope_of_tables(model)), "by model and pipeline")
    except ValueError as error:
        return str(error)


def explain_slot(slot: TableSlot, what: str, placed: str) -> str:
    """One line on what makes a model's tables."""
    text = "; text is not rotated" if slot.family.unrotated_text else ""
    name = slot.name or slot.family.leaf
    return f"{name}: {what}; positions {placed}{text}; applied by the model's own function"
