"""What a model's own rotary module does, read from the module itself and checked bit for bit."""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.hf.saving import NotSetYet
from rope_mm.rope_parameters import from_hf_config, read_head_dim
from rope_mm.rotation import PAIRINGS
from rope_mm.scheme import Scheme

# how positions (s, a) are handed to a module, and the shape its tables have before the channels
CALLS: dict[str, tuple[int, Callable[[Tensor], Tensor], Callable[[int], tuple[int, ...]]]] = {
    "rows": (3, lambda p: p.T[:, None], lambda s: (1, s)),  # M-RoPE: (3, b, s)
    "grid": (2, lambda p: p, lambda s: (s,)),  # towers: (s, 2), rows and columns
    "film": (3, lambda p: p, lambda s: (s,)),  # towers of videos
    "grids": (2, lambda p: p[None], lambda s: (1, s)),
    "words": (1, lambda p: p.T, lambda s: (1, s)),
}


def single(first: Tensor, _second: Tensor, _blocks: Any = ()) -> Tensor:
    """Each angle once."""
    return first


SPREADS = {name: join for name, (_, join) in PAIRINGS.items()} | {"single": single, "complex": single}


@dataclass(frozen=True)
class ModelRope:
    """How a model rotates: cosine and sine of positions @ omega in float32, times `factor`.

    Attributes:
        omega: radians per step (a, r), the module's own float32 numbers.
        call: how positions reach the module, a key of CALLS.
        spread: how r angles fill its tables, a key of SPREADS.
        wide: whether tables stay float32 in a model of another dtype.
        pairing: the channels that its function turns together, found by turning unit vectors.
        axes: a tower's coordinates in the order in which it has them.
        scheme: ours with the same Omega within float32's rounding, where the family is known.
    """

    omega: tuple[tuple[float, ...], ...]
    factor: float
    call: str
    spread: str
    wide: bool
    pairing: str = "half"
    axes: tuple[str, ...] = ()
    scheme: Scheme | None = None

    @property
    def pairs(self) -> int:
        """How many pairs of channels turn."""
        return len(self.omega[0])

    def fill(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Any:
        """Tables as the model expects them, from (..., r)."""
        if self.spread == "complex":
            return torch.complex(cos, sin)
        blocks = (self.pairs // len(self.omega),) * len(self.omega)
        cos, sin = (SPREADS[self.spread](x, x, blocks) for x in (cos, sin))
        return (cos, sin) if self.wide else (cos.to(dtype), sin.to(dtype))

    def cos_sin(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Any:
        """The model's tables at positions (..., a)."""
        omega = torch.tensor(self.omega, device=positions.device)
        angle: Any = sum(positions[..., axis, None].float() * omega[axis] for axis in range(len(self.omega)))
        if self.spread == "complex":
            return torch.polar(torch.ones_like(angle), angle) * self.factor
        return self.fill(angle.cos() * self.factor, angle.sin() * self.factor, dtype)


def rotary_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(name, owner, attribute, module) of each module without parts that has `inv_freq`s."""
    for name, owner in model.named_modules():
        for leaf, module in owner.named_children():
            buffers = [key for key, _ in module.named_buffers(recurse=False)]
            if any(key.endswith("inv_freq") for key in buffers) and not list(module.children()):
                yield f"{name}.{leaf}".strip("."), owner, leaf, module


def layer_types(module: nn.Module) -> list[str | None]:
    """The types of layers that the module tells apart, [None] if it does not."""
    kinds = getattr(module, "rope_type", None)
    return list(kinds) if isinstance(kinds, dict) else [None]


def refuse_bent(module: nn.Module, layer: str | None) -> None:
    """Refuse angles that depend on how long the sequence is.

    Raises:
        ValueError: rope_type "dynamic" or "longrope".
    """
    kind = getattr(module, "rope_type", "default")
    kind = kind[layer] if isinstance(kind, dict) else kind
    if "dynamic" in str(kind) or kind == "longrope":
        raise ValueError(
            f"{type(module).__name__} has rope_type {kind!r}, whose angles depend on the longest position "
            "and are no positions @ Omega; give set_rope a scheme, with a fixed extension such as YaRN"
        )


def spare(module: nn.Module) -> nn.Module:
    """A copy to ask, for some modules remember; on the meta device one newly made from the config."""
    config: Any = getattr(module, "config", None)
    if any(buffer.is_meta for buffer in module.buffers()):
        with torch.device("cpu"):
            made = type(module)(config)
    else:
        made = copy.deepcopy(module, {id(config): config})
    for name, value in list(vars(made).items()):
        if isinstance(value, NotSetYet):
            setattr(made, name, 1.0)
    return made


def ask(module: nn.Module, call: str, p: Tensor, layer: str | None, dtype: torch.dtype = torch.float32):
    """Tables of positions p (s, a) in a call of this kind; None where the module cannot be called so."""
    _, shape, lead = CALLS[call]
    device = next(module.buffers()).device
    x = torch.zeros(1, 1, 1, dtype=dtype, device=device)
    try:
        out = module(x, shape(p.to(device)), *([layer] if layer else []))
        cos, sin = (out.real, out.imag) if isinstance(out, Tensor) else out
        whole = isinstance(out, Tensor)
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError, KeyError):
        return None
    if cos.shape[:-1] != lead(len(p)):
        return None
    return cos.reshape(len(p), -1), sin.reshape(len(p), -1), whole


def spread_of(table: Tensor, axes: int, bare: str) -> tuple[str, Tensor]:
    """How the angles fill a table (s, d), and the channels that hold each once."""
    d = table.shape[-1]
    for spread in (*PAIRINGS, bare):
        join, r = SPREADS[spread], d if spread == bare else d // 2
        blocks = (r // axes,) * axes
        if (spread == "block" and sum(blocks) != r) or (spread != bare and d % 2):
            continue
        number = torch.arange(r, device=table.device)
        once = join(number, number, blocks)
        first = torch.stack([(once == i).nonzero()[0, 0] for i in range(r)])
        if torch.equal(table[:, first][:, once], table):
            return spread, first
    raise AssertionError("a bare table is any")


def read_module(module: nn.Module, layer: str | None = None, strict: bool = True) -> ModelRope:
    """What a rotary module does at every position, from what it does at unit positions.

    Not strict, it tells how the module is asked, whatever its angles are.

    Raises:
        ValueError: a module that is called in no known way, or is not positions @ Omega bit for bit.
    """
    if strict:
        refuse_bent(module, layer)
    module = spare(module)
    draw = torch.Generator().manual_seed(0)
    for call, (a, *_) in CALLS.items():
        far = torch.randint(0, 4096, (8, a), generator=draw)
        p = torch.cat((torch.zeros(1, a, dtype=torch.long), torch.eye(a, dtype=torch.long), far))
        if (tables := ask(module, call, p, layer)) is None:
            continue
        cos, sin, whole = tables
        spread, first = spread_of(torch.cat((cos, sin)), a, "complex" if whole else "single")
        angle = torch.atan2(sin[1 : a + 1, first], cos[1 : a + 1, first])
        low = ask(module, call, p, layer, torch.bfloat16)
        wide = low is not None and low[0].dtype == torch.float32
        omega = tuple(map(tuple, snapped(angle, module).tolist()))
        rope = ModelRope(omega, cos[0, 0].item(), call, spread, wide, axes=("t", "y", "x")[-a:])
        ours = rope.cos_sin(p.to(cos.device))
        ours = (ours.real, ours.imag) if whole else ours
        error = max((x - y).abs().max().item() for x, y in zip(ours, (cos, sin), strict=True))
        if strict and error != 0:
            raise ValueError(
                f"{type(module).__name__} is no positions @ Omega: its tables differ by {error:.1e}, so it "
                "cannot be read; give set_rope a scheme instead"
            )
        return rope
    raise ValueError(
        f"{type(module).__name__} takes positions and gives tables in no known way; served are "
        f"{', '.join(CALLS)}, with (cos, sin) for an answer"
    )


def snapped(angle: Tensor, module: nn.Module) -> Tensor:
    """Angles (a, r), each the module's own frequency where one is near: atan2 has rounded them."""
    own = torch.cat([b.flatten().float() for key, b in module.named_buffers() if key.endswith("inv_freq")])
    nearest = own[(angle[..., None] - own).abs().argmin(-1)]
    near = (nearest - angle).abs() <= 1e-5 * angle.abs().clamp(min=1e-30)
    return torch.where(near, nearest, angle)


APPLY = re.compile(r"apply_(multimodal_)?rotary_(pos_)?emb\w*$")


def seen_globals(module: nn.Module) -> tuple[str, ...]:
    """Names that a module's own forward looks up."""
    return inspect.unwrap(type(module).forward).__code__.co_names


def applied(owner: nn.Module) -> list[tuple[nn.Module, str]]:
    """Attention modules of an owner, and the names of the functions with which they rotate."""
    seen = [(module, name) for module in owner.modules() for name in seen_globals(module)]
    return [(module, name) for module, name in seen if APPLY.match(name)]


def paired(rope: ModelRope, owner: nn.Module) -> str:
    """The pairing of the function that an owner's attention calls; the tables' own where it cannot be asked.

    q' k with unit vectors for q, turned, and for k, not turned, meets the two channels of each pair alone;
    that holds also for functions that put the channels in another order.
    """
    told = {"single": "half", "complex": "interleaved"}.get(rope.spread, rope.spread)
    r, found = rope.pairs, applied(owner)
    if not found or any(p.is_meta for p in owner.parameters()):
        return told
    # DeepSeek's attention names two functions, and its config says which of them it calls
    module, name = found[0 if getattr(getattr(owner, "config", None), "rope_interleave", True) else -1]
    turn, unit = inspect.unwrap(type(module).forward).__globals__[name], torch.eye(2 * r)[None, None]
    angle = torch.linspace(0.5, 1, r).expand(1, 2 * r, r)
    try:
        q, _ = turn(unit, unit, *rope.fill(angle.cos(), angle.sin(), torch.float32))
        _, k = turn(unit, unit, *rope.fill(torch.ones_like(angle), torch.zeros_like(angle), torch.float32))
        partner = ((q @ k.mT) * (1 - unit)).abs().argmax(-1).flatten()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return told
    channel = torch.arange(2 * r)
    others = {"half": (channel + r) % (2 * r), "interleaved": channel ^ 1}
    return next((pairing for pairing, other in others.items() if torch.equal(partner, other)), told)


def named(rope: ModelRope, owner: nn.Module, config: Any, layer: str | None) -> ModelRope:
    """The rope with its pairing, and our scheme of the same Omega where its config tells one."""
    rope = replace(rope, pairing=paired(rope, owner))
    try:
        scheme = from_hf_config(config, layer)
        omega = scheme.omega(read_head_dim(config, layer)).float()
    except (ValueError, AttributeError, TypeError):
        return rope
    theirs = torch.tensor(rope.omega)
    for rows, axes in ((omega, rope.axes), (omega[1:], ("y", "x")), (omega[1:].flip(0), ("x", "y"))):
        same = rows.shape == theirs.shape and torch.allclose(rows, theirs, rtol=1e-5, atol=1e-12)
        if same and abs(scheme.factor - rope.factor) < 1e-5:
            return replace(rope, scheme=scheme, axes=axes)
    return rope
