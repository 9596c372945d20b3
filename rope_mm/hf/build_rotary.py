"""Whether a model can run a scheme: the module that will run it, or the reason why it cannot."""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from rope_mm.checks.arguments import parameters_of
from rope_mm.hf.attention_rotation import attention_modules
from rope_mm.hf.config_io import config_of, scheme_entries
from rope_mm.hf.image_positions import PIXELS
from rope_mm.hf.own_attention import own_pairing
from rope_mm.hf.rope_parameters import layer_config, read_head_dim
from rope_mm.hf.rotary_embedding import Rope, RopeMMRotaryEmbedding, RotarySlot
from rope_mm.hf.rotary_inspection import TOKEN_CALLS, ModelRope, attention_head_dim, read_module
from rope_mm.rotary.module import Rotary
from rope_mm.schemes.scheme import Scheme
from rope_mm.schemes.zoo import read_scheme

GRIDS = "grid", "grid-2d"  # layouts of rows and columns as towers count them
ROWS_AND_COLUMNS = "grid-2d"  # the one without an axis for text


def refuse(refusals: dict[str, Any]) -> None:
    """Raise a ValueError with the first sentence that holds."""
    for sentence in (sentence for sentence, holds in refusals.items() if holds):
        raise ValueError(sentence)


def read_given(
    given: Any, changes: Mapping[str, Any], name: str, width: int, pairing: str | None = None
) -> Scheme:
    """The scheme that `set_rope` was given for a model.

    Args:
        given: a key of SCHEMES, a Scheme, or what has one, such as a Rotary.
        changes: fields of the scheme to replace.
        name: of the model.
        width: channels of a head that it rotates.
        pairing: of its weights, which a key of SCHEMES takes over; None where they have none.

    Raises:
        ValueError: a Rotary of another width or with changes; what is no scheme; another pairing.
    """
    if isinstance(given, Rotary):
        other = (
            f"{name} rotates {width} channels of a head, so its Rotary needs that head_dim, not "
            f"{given.head_dim}; make another"
        )
        fixed = f"a Rotary cannot change {sorted(changes)} any more; make another, or give a scheme"
        refuse({other: given.head_dim != width, fixed: changes})
    if isinstance(given, str) and pairing:
        changes = {"pairing": pairing} | dict(changes)
    spec: Any = getattr(given, "scheme", given)
    scheme = read_scheme(spec, **changes)
    unlike = f"the scheme pairs channels {scheme.pairing!r}, but the weights are for {pairing!r}; change the "
    refuse({f"{unlike}scheme's pairing": pairing and scheme.pairing != pairing})
    return scheme


def make_rotary(site: RotarySlot, scheme: Any, changes: dict[str, Any]) -> RopeMMRotaryEmbedding:
    """The checked module for a slot."""
    original, config = site.module, config_of(site)
    interfaces = read_module(original, site.owner) if original else {}
    layers = list(interfaces) or [None]
    counts = f"{type(site.owner).__name__} counts the tokens that it compresses, and its keys stand at these "
    counts += "numbers, where a layout of images has no place for them; take a scheme of layout 'flat'"
    shared = "its config holds the scheme of another model; give each model copy.deepcopy(config)"
    refuse({shared: scheme_entries(config)})
    bare = [] if original else attention_modules(site.owner)
    width = 0 if original else attention_head_dim(site.owner, bare)
    pairing = own_pairing(bare)
    given = scheme if isinstance(scheme, Mapping) else dict.fromkeys(layers, scheme)
    unlike = f"layers are of the types {layers}, but schemes came for {list(given)}"
    refuse({unlike: set(given) != set(layers)})
    name = type(original or site.owner).__name__
    ropes = {
        layer: make_rope(
            given[layer], interfaces.get(layer), name, layer_config(config, layer), changes, width, pairing
        )
        for layer in layers
    }
    refuse(
        {
            counts: counts_tokens(site.owner)
            and any(x.scheme and x.scheme.layout != "flat" for x in ropes.values())
        }
    )
    no_text = (
        f"layout {ROWS_AND_COLUMNS!r} is of rows and columns alone, but {type(site.owner).__name__} reads "
        "text, which has one axis; take 'flat' or, for text with images, 'rope-tv'"
    )
    laid_out = {rope.scheme.layout for rope in ropes.values() if rope.scheme}
    refuse({no_text: ROWS_AND_COLUMNS in laid_out and reads_text(site, interfaces)})
    layouts = {rope.scheme and (rope.scheme.layout, rope.scheme.options) for rope in ropes.values()}
    refuse({f"layers would place tokens by several layouts, {layouts}; give one layout": len(layouts) > 1})
    return RopeMMRotaryEmbedding(ropes, interfaces, original, config)


def reads_text(site: RotarySlot, interfaces: Mapping[Any, ModelRope]) -> bool:
    """Whether the positions of a slot grow with every token of a text."""
    if site.module:
        return all(rope.call_format in TOKEN_CALLS for rope in interfaces.values())
    return getattr(site.owner, "main_input_name", "") == "input_ids"


def counts_tokens(owner: Any) -> bool:
    """Whether a part of a model rotates at positions that it makes itself, not at those that it is given."""
    makes = "arange" in inspect.unwrap(type(owner).forward).__code__.co_names
    return makes and "position_ids" in parameters_of(type(owner)) and not isinstance(owner, PreTrainedModel)


def make_rope(
    given: Any,
    interface: ModelRope | None,
    name: str,
    config: Any,
    changes: dict[str, Any],
    width: int,
    pairing: str | None,
) -> Rope:
    """What runs: a rope of the same kind or a Rotary as given, a scheme as a Rotary."""
    width = 2 * interface.pairs if interface else width
    if isinstance(given, ModelRope) and interface:
        mine, theirs = ((rope.call_format, rope.table_format, rope.pairs) for rope in (given, interface))
        why = (
            f"this rope was read from another kind of module ({given.call_format}, {given.pairs} pairs); "
            f"{name} takes {interface.call_format} and rotates {interface.pairs} pairs"
        )
        fixed = f"a rope that was read from a model cannot change {sorted(changes)}; give a scheme"
        refuse({why: mine != theirs, fixed: changes})
        return given
    chosen = read_given(given, changes, name, width, interface.pairing if interface else pairing)
    if interface:
        check_scheme(chosen, interface, name, read_head_dim(config) if config else width)
        chosen = chosen.replace(fraction=1.0, channel_offset="start")
    heads: Any = config.num_attention_heads if chosen.per_head else None
    unlike = f"{chosen} has an Omega for each head, but the numbers of heads of {name} differ"
    refuse({unlike: heads is not None and not isinstance(heads, int)})
    return given if isinstance(given, Rotary) else Rotary(width, chosen, heads=heads)


def check_scheme(scheme: Scheme, interface: ModelRope, name: str, head_dim: int) -> None:
    """Refuse a scheme that the tables of this module cannot express."""
    a, pairs = len(scheme.axes), interface.pairs if scheme.fraction == 1 else scheme.pairs(head_dim)
    one_table = f"but {name} makes one table for all heads and every length"
    other_part = pairs != interface.pairs or 2 * interface.pairs > head_dim
    of_tokens, walk = interface.call_format in TOKEN_CALLS, ([0.0] * a, [1.0] * a)
    stays = of_tokens and scheme.text_line != walk
    off_grid = not of_tokens and interface.call_format != PIXELS and scheme.layout not in GRIDS
    refusals = {
        f"{scheme} has an Omega for each head, {one_table}": scheme.per_head,
        f"{scheme} has an Omega that depends on the length, {one_table}": scheme.needs_length,
        f"fraction {scheme.fraction} of head_dim {head_dim} makes {pairs} pairs, but {name} rotates "
        f"{interface.pairs}; leave the fraction at 1 to take the model's": other_part,
        f"layout {scheme.layout!r} does not count text tokens along all of its axes, as decoding does": stays,
        f"{name} is given rows and columns alone, for layouts {GRIDS}, not {scheme.layout!r}": off_grid,
    }
    refuse(refusals)
