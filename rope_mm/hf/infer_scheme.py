"""The scheme of a config whose model type no table names: read from the rotary module that the config makes.

The module is found beside the config's class, made from the config and probed as `rotary_inspection` probes
modules of live models. A scheme is returned only if its Omega is the module's.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rope_mm.hf.cos_sin_tables import find_pairing
from rope_mm.hf.rope_parameters import BASES, read_head_dim, scheme_of_family
from rope_mm.hf.rotary_inspection import (
    APPLY_FUNCTION,
    NO_ANSWER,
    TABLE_PAIRINGS,
    ModelRope,
    layer_types,
    match_scheme,
    read_layer,
)
from rope_mm.schemes.scheme import Scheme


def derive_scheme(config: Any, layer_type: str | None) -> Scheme:
    """The scheme by which the rotary module of a config rotates.

    Args:
        config: a config of transformers.
        layer_type: which layers, where they differ.

    Raises:
        ValueError: no rotary module beside the config, or one whose Omega no known family has.
    """
    modules = list(rotary_modules(config))
    if not modules:
        raise ValueError(f"no rotary module can be made from a {type(config).__name__}")
    reasons: list[str] = []
    for module in modules:
        layer = layer_type if layer_type in layer_types(module) else None
        if layer not in layer_types(module):
            known = ", ".join(map(str, layer_types(module)))
            reasons.append(f"its layers are rotated in different ways; give layer_type, one of {known}")
            continue
        try:
            rope = read_layer(module, module, layer, str(layer_types(module).get(layer)))
        except (ValueError, KeyError) as error:
            reasons.append(str(error))
            continue
        if rope.nonlinear_reason:
            reasons.append(f"{type(module).__name__} {rope.nonlinear_reason}")
        elif found := scheme_of_rope(replace(rope, pairing=pairing_beside(module, rope)), config, layer_type):
            return found
        else:
            reasons.append(f"the Omega of {type(module).__name__} is that of no known family")
    raise ValueError(
        f"a {type(config).__name__} cannot be read as a scheme: {'; '.join(dict.fromkeys(reasons))}"
    )


def rotary_modules(config: Any) -> Iterator[nn.Module]:
    """The rotary modules beside a config's class that can be made from it."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        beside = vars(importlib.import_module(name))
    except ImportError:
        return
    kinds = [kind for kind in beside.values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    named = [kind for kind in kinds if re.search("Rotary|R[Oo]P[Ee]|Rope", kind.__name__)]
    # a module may be annotated with the config of another part, whose rope_parameters this one has as well
    for kind in sorted(named, key=lambda kind: not is_made_for(kind, config)):
        given = inspect.signature(kind.__init__).parameters.get("config")
        vision = "Vision" in type(config).__name__ + kind.__name__  # its positions are other ones
        borrowed = not vision and getattr(config, "rope_parameters", None)
        if given is None or not (is_made_for(kind, config) or borrowed):
            continue
        try:
            with torch.device("cpu"):
                yield kind(config).eval()
        except (*NO_ANSWER, NotImplementedError):
            continue


def is_made_for(kind: type, config: Any) -> bool:
    """Whether a module's class takes configs of this class, or of any."""
    given = inspect.signature(kind.__init__).parameters.get("config")
    wanted = getattr(given and given.annotation, "__name__", given and given.annotation)
    return wanted in (inspect.Parameter.empty, "_empty", type(config).__name__)


def pairing_beside(module: nn.Module, rope: ModelRope) -> str:
    """The pairing of the rotary function beside a module; its tables' own where there is none."""
    default = TABLE_PAIRINGS.get(rope.table_format, rope.table_format)
    beside = vars(importlib.import_module(type(module).__module__))
    r = rope.pairs
    unit, angle = torch.eye(2 * r)[None, None], torch.linspace(0.5, 1, r).expand(1, 2 * r, r)
    interleaved = getattr(getattr(module, "config", None), "rope_interleave", True)
    names = sorted(
        filter(APPLY_FUNCTION.match, beside), key=lambda name: ("interleave" in name) != interleaved
    )
    for name in names:
        try:
            q, _ = beside[name](unit, unit, *rope.tables(angle, 1.0, torch.float32))
            _, k = beside[name](unit, unit, *rope.tables(0 * angle, 1.0, torch.float32))
        except NO_ANSWER:
            continue
        if found := find_pairing(q[0, 0], k[0, 0]):
            return found
    return default


def scheme_of_rope(rope: ModelRope, config: Any, layer_type: str | None) -> Scheme | None:
    """A scheme of some family with this Omega and pairing, None if there is none."""
    head_dim = max(read_head_dim(config, layer_type), 2 * rope.pairs)
    for base in dict.fromkeys(BASES.values()):
        if not fits_call(base, rope):
            continue
        for fraction in (None, 2 * rope.pairs / head_dim):
            try:
                scheme = scheme_of_family(config, base, layer_type, fraction=fraction)
                scheme = scheme.replace(pairing=rope.pairing)
                omega = scheme.omega(head_dim).float()
            except (ValueError, AttributeError, TypeError, KeyError):
                continue
            if match_scheme(scheme, rope, omega):
                return scheme
    return None


def fits_call(base: Scheme, rope: ModelRope) -> bool:
    """Whether positions reach the module as a family's layout has them: as text, M-RoPE or a grid."""
    if rope.call_format == "tokens":
        return len(base.axes) == 1
    return len(base.axes) > 1 and (base.layout in ("grid", "centres", "normalized_centers")) == (
        rope.call_format != "mrope"
    )
