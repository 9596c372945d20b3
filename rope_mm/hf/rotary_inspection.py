"""What a model's own rotary module does, read from the module itself and checked bit for bit."""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.hf.cos_sin_tables import (
    fill_tables,
    find_pairing,
    find_table_format,
    read_tables,
    split_tables,
)
from rope_mm.hf.image_positions import PIXELS, centres_in_radians, image_size
from rope_mm.hf.rope_parameters import from_hf_config, read_head_dim
from rope_mm.rotary.dispatch import RotarySpec
from rope_mm.schemes.scheme import Scheme

# the axes of the positions that a module takes, and positions (s, a) in the shape that it takes
CALLS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "mrope": ("tyx", lambda p: p.T[:, None]),  # M-RoPE: (3, b, s)
    "video_grid": ("tyx", lambda p: p),  # towers that say `include_temporal`
    "grid": ("yx", lambda p: p),  # other towers: (s, 2), rows and columns
    "tokens": ("t", lambda p: p.T),
}
TOKEN_CALLS = "mrope", "tokens"  # positions of decoders, which grow with every token
NO_ANSWER = RuntimeError, IndexError, TypeError, ValueError, AttributeError, KeyError

ATTENTION_REGISTRY = re.compile("ALL_ATTENTION_FUNCTIONS$")
# the pairing of functions that are given tables with each angle once
TABLE_PAIRINGS = {"single": "half", "complex": "interleaved", "sin_cos": "interleaved"}
APPLY_FUNCTION = re.compile(r"apply_(multimodal_)?rotary_(pos_)?emb\w*$")


@dataclass(frozen=True)
class ModelRope:
    """How a model rotates: cosine and sine of positions @ omega in float32, times `factor`.

    Attributes:
        omega: radians per step (a, r), the module's own float32 numbers.
        factor: what cosine and sine are multiplied by.
        call_format: how positions reach the module, a key of CALLS or PIXELS; of an image they are 2 pi times
            the centres of its patches.
        table_format: how r angles fill its tables, a key of `cos_sin_tables.TABLE_FORMATS`.
        float32_tables: whether tables stay float32 in a model of another dtype.
        pairing: the channels that its function rotates together, found by rotating unit vectors.
        axes: a tower's coordinates in the order in which it has them.
        scheme: ours with the same Omega within float32's rounding, where the family is known.
        nonlinear_reason: why it is no positions @ Omega, bit for bit; empty where it is.
    """

    omega: tuple[tuple[float, ...], ...]
    factor: float
    call_format: str
    table_format: str
    float32_tables: bool
    pairing: str = "half"
    axes: tuple[str, ...] = ()
    scheme: Scheme | None = None
    nonlinear_reason: str = ""

    @property
    def pairs(self) -> int:
        """How many pairs of channels are rotated."""
        return len(self.omega[0])

    def angles(self, positions: Tensor, omega: Tensor | None = None) -> Tensor:
        """Radians (..., r) at positions (..., a), in float32 as transformers makes them.

        Args:
            positions: (..., a).
            omega: the numbers of `omega` as a tensor (a, r), if there is one already.
        """
        rows = (torch.tensor(self.omega) if omega is None else omega).to(positions.device)
        steps = positions.float()
        if len(rows) == 1:
            return steps * rows
        angle: Any = sum(steps[..., axis, None] * row for axis, row in enumerate(rows))
        return angle

    @property
    def spec(self) -> RotarySpec:
        """How angles rotate channels."""
        return RotarySpec(self.pairing, factor=self.factor)

    def tables(self, angle: Tensor, factor: float, dtype: torch.dtype) -> Any:
        """Tables of angles (..., r) as the model expects them."""
        tables = fill_tables(angle, self.table_format, factor, len(self.omega))
        return tables if self.float32_tables else tuple(x.to(dtype) for x in tables)


def frequencies(module: nn.Module) -> list[Tensor]:
    """The `inv_freq`s of a rotary module, or those of its table of sines; none for any other module."""
    named = dict(module.named_buffers(recurse=False))
    found = [x for name, x in named.items() if name.endswith("inv_freq") and not list(module.children())]
    if not found and longest_position(module):  # GPT-J, CodeGen
        table = named["embed_positions"]
        steps = torch.arange(0, table.shape[-1], 2, dtype=torch.int64, device=table.device)
        found = [1.0 / (10000 ** (steps / table.shape[-1]))]
    return found


def longest_position(module: nn.Module) -> int:
    """How many positions a rotary module has in its table; 0 for a module that computes them."""
    table = dict(module.named_buffers(recurse=False)).get("embed_positions")
    rotary = "rotary" in type(module).__name__.lower() and table is not None and table.dim() == 2
    return len(table) if rotary and table is not None else 0


def frequency_counts(module: Any) -> dict[str | None, int]:
    """How many frequencies a module looks up by its rope type, by layer type; empty if it looks none up."""
    if module is None or not frequencies_by_type(type(module)):
        return {}
    named, layers = dict(module.named_buffers(recurse=False)), layer_types(module)
    buffers = {layer: named.get(f"{layer}_inv_freq" if layer else "inv_freq") for layer in layers}
    counts = {layer: x.numel() for layer, x in buffers.items() if x is not None}
    return counts if len(counts) == len(layers) else {}


def layer_types(module: Any) -> dict[str | None, Any]:
    """The rope type of each layer type that a rotary module distinguishes; None is the key of one for all."""
    kinds = getattr(module, "rope_type", None)
    return kinds if isinstance(kinds, dict) and kinds else {None: kinds}


def frequencies_by_type(kind: type) -> bool:
    """Whether a rotary module asks transformers' registry for the frequencies of its rope type."""
    return "ROPE_INIT_FUNCTIONS" in kind.__init__.__code__.co_names


def read_module(module: nn.Module, owner: nn.Module) -> dict[str | None, ModelRope]:
    """What a rotary module does, by layer type.

    Args:
        module: the rotary module.
        owner: the module that holds and calls it.

    Returns:
        A ModelRope for each layer type that the module distinguishes; the key is None where it serves all.

    Raises:
        ValueError: a module that takes positions or gives tables in no known way.
    """
    config = getattr(module, "config", None) or getattr(owner, "config", None)
    with torch.device("cpu"):  # also where a model is built under torch.device("meta")
        return {
            layer: attach_scheme(read_layer(module, owner, layer, str(kind)), owner, config, layer)
            for layer, kind in layer_types(module).items()
        }


def probe_copy(module: nn.Module) -> nn.Module:
    """A copy to probe, for some modules keep state; of one on the meta device a new one from the config."""
    config: Any = getattr(module, "config", None)
    with torch.device("cpu"):
        lost = any(buffer.is_meta for buffer in module.buffers())
        made = type(module)(config) if lost else copy.deepcopy(module, {id(config): config})
    return made.eval()


def probe_calls(
    module: nn.Module, owner: nn.Module, layer: str | None
) -> Iterator[tuple[str, str, Tensor, Any]]:
    """Ways to call a module: name, axes, positions (s, a) with the origin and unit steps, and arguments."""
    device, generator = next(module.buffers(), torch.empty(0)).device, torch.Generator().manual_seed(0)
    other = "grid" if getattr(owner, "include_temporal", False) else "video_grid"
    for call, (axes, shape) in (item for item in CALLS.items() if item[0] != other):
        a = len(axes)
        far = torch.randint(0, longest_position(module) or 4096, (8, a), generator=generator)
        p = torch.cat((torch.zeros(1, a, dtype=torch.long), torch.eye(a, dtype=torch.long), far)).to(device)
        yield call, axes, p, (torch.zeros(1, 1, 1, device=device), shape(p), *([layer] if layer else ()))
    config: Any = getattr(module, "config", None)
    with suppress(*NO_ANSWER):
        image = torch.zeros(
            1, 1, *image_size(config, 9, 11), device=device
        )  # odd, so that one patch is in the middle
        yield PIXELS, "yx", centres_in_radians(config, image, training=False), (image,)


def detect_interface(
    module: nn.Module, owner: nn.Module, layer: str | None
) -> tuple[str, str, Tensor, Any, Any]:
    """How a module takes positions, their axes, some (s, a), and its tables in float32 and bfloat16."""
    for call, axes, p, (x, *more) in probe_calls(module, owner, layer):
        with suppress(*NO_ANSWER):
            exact, low = (module(x.to(dtype), *more) for dtype in (torch.float32, torch.bfloat16))
            if all(x.shape[:-1].numel() == len(p) for x in split_tables(exact)):
                return call, axes, p, exact, low
    raise ValueError(
        f"{type(module).__name__} takes positions and gives tables in no known way; served are "
        f"{', '.join(CALLS)} and {PIXELS}, with (cos, sin) as the result"
    )


@torch.no_grad()
def refuse_mixed_axes(module: Any) -> None:
    """Refuse a module that turns the two channels of a pair along different axes (HunYuanVL).

    With equal positions on all axes, as of text, it looks like any other.

    Raises:
        ValueError: such a module.
    """
    sections = getattr(module, "mrope_section", None)
    if not isinstance(sections, Sequence):
        return
    rows = torch.arange(1, 1 + len(sections), device=next(module.buffers()).device)[:, None, None]
    try:
        tables = split_tables(module(torch.zeros(1, 1, 1, device=rows.device), rows))
        table_format, once = find_table_format(torch.cat([x.flatten(0, -2) for x in tables]), 1)
    except NO_ANSWER:
        return
    pairs = module.inv_freq.numel()
    if table_format == "single" and once.shape[-1] == 2 * pairs:
        raise ValueError(
            f"{type(module).__name__} turns the two channels of a pair along different ones of its "
            f"{len(sections)} axes, which is no rotation, so no scheme can take its place; it is not served"
        )


def read_layer(module: nn.Module, owner: nn.Module, layer: str | None, kind: str) -> ModelRope:
    """What a rotary module does at every position, read from its tables one step from the origin."""
    module = probe_copy(module)
    refuse_mixed_axes(module)
    call, axes, p, exact, low = detect_interface(module, owner, layer)
    table_format, omega, factor = read_tables(exact, p, torch.cat([x.flatten() for x in frequencies(module)]))
    float32_tables = split_tables(low)[0].dtype == torch.float32
    rope = ModelRope(
        tuple(map(tuple, omega.tolist())), factor, call, table_format, float32_tables, axes=tuple(axes)
    )
    ours = rope.tables(rope.angles(p), factor, torch.float32)
    pairs = zip(split_tables(ours), split_tables(exact), strict=True)
    if error := max((x.flatten() - y.flatten()).abs().max().item() for x, y in pairs):
        rope = replace(
            rope, nonlinear_reason=f"has tables that differ by {error:.1e} from what could be read"
        )
    if "dynamic" in kind or kind == "longrope":
        rope = replace(
            rope, nonlinear_reason=f"has rope_type {kind!r}, whose angles depend on the longest position"
        )
    return rope


def globals_used(module: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    """Names of the globals that match the pattern and that a module's own forward looks up."""
    return list(filter(pattern.match, inspect.unwrap(type(module).forward).__code__.co_names))


def modules_using(owner: nn.Module, pattern: re.Pattern[str]) -> list[nn.Module]:
    """Modules of an owner whose forward looks such a global up, except cross-attention."""
    mine = (module for module in owner.modules() if "cross" not in type(module).__name__.lower())
    return [module for module in mine if globals_used(module, pattern)]


def rotates_one_by_one(module: nn.Module) -> bool:
    """Whether an attention's rotary function takes queries and keys in two calls, as GPT-J's does."""
    forward = inspect.unwrap(type(module).forward)
    functions = [forward.__globals__.get(name) for name in globals_used(module, APPLY_FUNCTION)]
    names = [[*inspect.signature(x).parameters] for x in functions if inspect.isfunction(x)]
    return any(re.match("sin|cos|freq", second) for _, second, *_ in (x for x in names if len(x) > 1))


def attention_head_dim(owner: Any, attentions: list[nn.Module]) -> int:
    """Channels of a head of the attention modules of a model without rotary.

    Raises:
        ValueError: heads that differ, or a size that neither the modules nor the config say.
    """
    found = set(map(module_head_dim, attentions))
    if len(found) > 1:
        raise ValueError(
            f"{type(owner).__name__} has heads of {sorted(found)} channels, and one Omega fits one size"
        )
    return found.pop() if found and found != {0} else read_head_dim(owner.config)


def module_head_dim(module: Any) -> int:
    """Channels of a head of an attention module; 0 where it does not say."""
    for name in ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_per_head"):
        if isinstance(size := getattr(module, name, None), int):
            return size
    width, heads = getattr(module, "dim_out", None), getattr(module, "num_attention_heads", None)
    return width // heads if width and heads else 0


def detect_pairing(rope: ModelRope, owner: nn.Module) -> str:
    """The pairing of the function that an owner's attention calls; the tables' own where none is found."""
    default = TABLE_PAIRINGS.get(rope.table_format, rope.table_format)
    found, r = modules_using(owner, APPLY_FUNCTION), rope.pairs
    if not found or any(p.is_meta for p in owner.parameters()):
        return default
    # DeepSeek's attention names two functions, and its config says which of them it calls
    first = getattr(getattr(owner, "config", None), "rope_interleave", True)
    name = globals_used(found[0], APPLY_FUNCTION)[0 if first else -1]
    rotate, unit = inspect.unwrap(type(found[0]).forward).__globals__[name], torch.eye(2 * r)[None, None]
    angle = torch.linspace(0.5, 1, r).expand(1, 2 * r, r)
    turned, still = (rope.tables(x, 1.0, torch.float32) for x in (angle, 0 * angle))
    try:
        if rotates_one_by_one(found[0]):
            q, k = rotate(unit, *turned), rotate(unit, *still)
        else:
            q, k = rotate(unit, unit, *turned)[0], rotate(unit, unit, *still)[1]
        return find_pairing(q[0, 0], k[0, 0]) or default
    except NO_ANSWER:
        return default


def attach_scheme(rope: ModelRope, owner: nn.Module, config: Any, layer: str | None) -> ModelRope:
    """The rope with its pairing, and with our scheme of the same Omega where its config names one."""
    rope = replace(rope, pairing=detect_pairing(rope, owner))
    try:
        scheme = from_hf_config(config, layer)
        omega = scheme.omega(read_head_dim(config, layer)).float()
    except (ValueError, AttributeError, TypeError):
        return rope
    return match_scheme(scheme, rope, omega) or rope


def match_scheme(scheme: Scheme, rope: ModelRope, omega: Tensor) -> ModelRope | None:
    """The rope with a scheme whose omega (a, r) is the rope's own within float32; None if it is not."""
    theirs = torch.tensor(rope.omega) * (math.tau if rope.call_format == PIXELS else 1)
    for rows, axes in ((omega, rope.axes), (omega[1:], ("y", "x")), (omega[1:].flip(0), ("x", "y"))):
        same = rows.shape == theirs.shape and torch.allclose(rows, theirs, rtol=1e-5, atol=1e-12)
        if same and abs(scheme.attention_scaling - rope.factor) < 1e-5:
            return replace(rope, scheme=scheme, axes=axes)
    return None
