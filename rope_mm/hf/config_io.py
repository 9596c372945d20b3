"""A scheme in a model's config: saved with the model, and read again.

A saved config has the rope type "rope_mm", a name that this module adds to transformers' registries of rope
types and of attentions; where it is not known, the model does not load. A loaded model waits for
`set_rope(model)`: until then its rotary module raises, or its attention, where the rotary module asks no
registry. An attention that waits must do so also where `from_pretrained` is given another one: configs get a
property for that when such a config is read or written, and lose it with the last model of this kind.
"""

from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rope_mm.hf.rotary_inspection import ATTENTION_REGISTRY, globals_used, layer_types
from rope_mm.schemes.scheme import Scheme

NAME, ATTENTION_FIELD = "rope_mm", "_attn_implementation_internal"
EXPERTS_FIELD, OWN_POST_INIT = "_experts_implementation_internal", PreTrainedModel.post_init
# fields of a saved config with values that transformers alone refuses; a caller may ask for another attention
LOCKS = "attn_implementation", "experts_implementation"
COUNT = "rope_mm_frequencies"  # beside a scheme: how many frequencies the model's own module has
OWN = "rope_mm_own_type"  # beside a scheme: the rope type of the model's own
BIAS = "rope_mm_relative_bias"  # beside a scheme: whether a bias of relative positions is kept or dropped
WAITS = "rope_mm_waits"  # beside a scheme: the attention waits for it, and not the rotary module
PENDING_MESSAGE = (
    "this model was saved with a scheme that is not set yet. Call rope_mm.hf.set_rope(model) before it runs; "
    "if only a part of the model has a scheme, such as its vision encoder, call set_rope with that part"
)


class PendingScheme:
    """The factor of cosine and sine until `set_rope(model)`; no tensor can be multiplied by it."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any):
        raise ValueError(PENDING_MESSAGE)


def pending_frequencies(
    config: Any, *_: Any, layer_type: str | None = None, **__: Any
) -> tuple[Tensor, PendingScheme]:
    """What transformers gets for a saved scheme: as many frequencies as it had, and a factor that refuses."""
    return torch.linspace(1, 0.1, scheme_entry(config, layer_type)[COUNT]), PendingScheme()


def mark_pending(*_: Any, **__: Any) -> None:
    """The attention of a model that waits for its saved scheme."""
    raise ValueError(PENDING_MESSAGE)


def validate_saved(config: Any, rope: dict[str, Any], ignore_keys: Any = None) -> None:
    """What transformers calls when it reads a config with the rope type "rope_mm"."""
    if WAITS in rope and not is_running(config):
        guard_attention()
        rope["rope_type"] = rope[OWN]
        known = set(config.ignore_keys_at_rope_validation or ())
        config.ignore_keys_at_rope_validation = known | {NAME, COUNT, OWN, WAITS, BIAS}


class Running(str):
    """The attention of a config whose model runs its scheme; a copy of the config alone waits again."""

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return self if any(isinstance(copied, nn.Module) for copied in memo.values()) else str(self)


def scheme_entry(config: Any, layer: str | None) -> dict[str, Any]:
    """What a config holds of the scheme of layers of this type; empty if it holds none."""
    for field in ("rope_parameters", NAME):
        rope: Any = getattr(config, field, None) or {}
        entry = rope.get(layer) if isinstance(rope.get(layer), dict) else rope
        if NAME in entry:
            return entry
    return {}


def scheme_entries(config: Any) -> list[dict[str, Any]]:
    """All that a config holds of schemes, of all layers or by their types."""
    fields: list[Any] = [getattr(config, field, None) or {} for field in ("rope_parameters", NAME)]
    held = [entry for field in fields for entry in (field, *field.values()) if isinstance(entry, dict)]
    return [entry for entry in held if NAME in entry]


def is_pending(config: Any) -> bool:
    """Whether a config makes its attention wait for a saved scheme that its model does not run yet."""
    return any(WAITS in entry for entry in scheme_entries(config)) and not is_running(config)


def is_running(config: Any) -> bool:
    """Whether a config's model runs the scheme for which its attention would wait."""
    return isinstance(vars(config).get("attn_implementation"), Running)


def waits_for_scheme(module: Any, config: Any) -> bool:
    """Whether a rotary module, or a model of this config, still waits for the scheme it was saved with."""
    return is_pending(config) or PendingScheme in map(type, vars(module).values())


def get_attention(config: Any) -> Any:
    """The attention of a config; while it waits, the one that refuses, whatever was asked for."""
    return NAME if is_pending(config) else vars(config).get(ATTENTION_FIELD)


def set_attention(config: Any, name: Any) -> None:
    """Set the attention of a config; one that waits keeps what was asked for."""
    if name != NAME or not is_pending(config):
        vars(config)[ATTENTION_FIELD] = name


PATCHED: WeakSet[Any] = WeakSet()  # our modules in models whose saved attention would wait


def guard_attention() -> None:
    """Keep the attention of configs that wait, also where another one is asked for."""
    setattr(PreTrainedConfig, ATTENTION_FIELD, property(get_attention, set_attention))


def post_init(model: Any) -> None:
    """Replaces the end of a model's construction: a model of a config with a scheme waits for it.

    Where its attention looks nothing up, its forward waits. The locks of the config are there again, in case
    that it is saved as it is.
    """
    OWN_POST_INIT(model)
    if not is_pending(model.config):
        return
    guard_attention()
    for lock in LOCKS:
        vars(model.config).setdefault(lock, NAME)
    if not any(globals_used(part, ATTENTION_REGISTRY) for part in model.modules()):
        vars(model)["forward"] = mark_pending


def release_guard(rotary: Any) -> None:
    """Undo `guard_attention` after the last of these models."""
    PATCHED.discard(rotary)
    if not PATCHED and ATTENTION_FIELD in vars(PreTrainedConfig):
        delattr(PreTrainedConfig, ATTENTION_FIELD)


ROPE_INIT_FUNCTIONS[NAME] = pending_frequencies  # pyright: ignore[reportArgumentType]
ALL_ATTENTION_FUNCTIONS.register(NAME, mark_pending)
ALL_EXPERTS_FUNCTIONS.register(NAME, mark_pending)
PreTrainedModel.post_init = post_init  # pyright: ignore
setattr(RotaryEmbeddingConfigMixin, f"_validate_{NAME}_rope_parameters", validate_saved)


def save_schemes(rotary: Any, schemes: dict[str | None, Scheme], counts: dict[str | None, int]) -> None:
    """Write schemes into the config of a model that runs them; models that are loaded from it wait.

    Args:
        rotary: our module, which records how to undo this.
        schemes: by layer type.
        counts: how many frequencies the model's own module has, by layer type; empty if its rotary does not
            look up the rope type, so that its attention must wait.
    """
    config, checked = rotary.config, is_valid(rotary.config)
    old: Any = getattr(config, "rope_parameters", None) or {}
    own = {layer: (old.get(layer) or {}) if layer else old for layer in schemes}
    held = {
        layer: {NAME: scheme.to_dict(), OWN: own[layer].get(OWN) or own[layer].get("rope_type", "default")}
        for layer, scheme in schemes.items()
    }
    if rotary.relative_bias:
        held = {layer: {**entry, BIAS: rotary.relative_bias} for layer, entry in held.items()}
    by_rope = {layer: {**entry, COUNT: counts.get(layer)} for layer, entry in held.items()}
    if counts and write_fields(rotary, checked, {"rope_parameters": by_layer(old, own, by_rope)}):
        return
    waiting = {layer: {**entry, WAITS: True} for layer, entry in held.items()}
    guarded = dict(zip(LOCKS, (Running(NAME), NAME), strict=True))
    if not write_fields(rotary, checked, {"rope_parameters": by_layer(old, own, waiting), **guarded}):
        write_fields(rotary, False, {NAME: waiting.get(None) or waiting, **guarded})
    guard_attention()
    PATCHED.add(rotary)
    rotary.undo.append(Release(rotary))


def by_layer(old: dict[str, Any], own: dict[Any, Any], held: dict[Any, Any]) -> dict[str, Any]:
    """rope_parameters of the rope type "rope_mm" with what is held, for all layers or by their types."""
    new = {layer: {**own[layer], **entry, "rope_type": NAME} for layer, entry in held.items()}
    return new.get(None) or {**old, **new}


def write_fields(rotary: Any, checked: bool, fields: dict[str, Any]) -> bool:
    """Set fields of a config; where that is checked, none if transformers would not save and load it then."""
    older = len(rotary.undo)
    for name, value in fields.items():
        rotary.set_attr(rotary.config, name, value)
    if checked and not is_valid(rotary.config):
        rotary.restore(older)
        return False
    return True


class Release:
    """`release_guard` of one module, to be called when it is undone."""

    def __init__(self, rotary: Any):
        self.rotary = rotary

    def __call__(self) -> None:
        release_guard(self.rotary)


def is_valid(config: Any) -> bool:
    """Whether transformers would save and load this config."""
    try:
        config.validate()
        type(config)(**config.to_dict())
    except Exception:  # whatever its validators raise
        return False
    return True


def saved_schemes(site: Any) -> dict[str | None, Scheme]:
    """The schemes with which a slot's model was saved, by layer type.

    Raises:
        ValueError: a config that holds none.
    """
    config, layers = config_of(site), layer_types(site.module)
    entries = {layer: scheme_entry(config, layer) for layer in layers}
    if all(entries.values()):
        return {layer: Scheme.from_dict(entry[NAME]) for layer, entry in entries.items()}
    raise ValueError(
        f"{type(config).__name__} contains no scheme of rope_mm; name one, as in set_rope(model, 'rope-tv'), "
        "or load a model that was saved after set_rope"
    )


def saved_bias(site: Any) -> str | None:
    """What became of the bias of relative positions of the model that was saved."""
    entries = [scheme_entry(config_of(site), layer) for layer in layer_types(site.module)]
    return next((entry[BIAS] for entry in entries if BIAS in entry), None)


def config_of(site: Any) -> Any:
    """The config that a slot's rotary module reads, or would read."""
    return getattr(site.module, "config", None) or getattr(site.owner, "config", None)


def wake_slots(model: nn.Module, sites: list[Any], changes: Any) -> list[Any]:
    """Make slots that wait for a saved scheme what they would be without one.

    Args:
        model: the model that `set_rope` was given.
        sites: RotarySlots.
        changes: records how to undo it.

    Returns:
        The slots, with the rotary modules that they have now.
    """
    owners = [getattr(site.owner, "config", None) for site in sites]
    waiting = [waits_for_scheme(site.module or site.owner, x) for site, x in zip(sites, owners, strict=True)]
    attentions = [is_pending(config) for config in owners]
    for site, waits in zip(sites, waiting, strict=True):
        if waits:
            remove_schemes(config_of(site), changes)
            for config in copied_configs(site):
                remove_schemes(config, changes)
    for part in model.modules() if any(waiting) else ():
        if vars(part).get("forward") is mark_pending:
            changes.undo.append(partial(vars(part).update, forward=vars(part).pop("forward")))
    for n, site in enumerate(sites):
        if waiting[n] and owners[n]:
            choose_experts(site.owner, changes)
        if attentions[n]:
            choose_attention(site.owner, changes)
        elif waiting[n]:
            module = type(site.module)(config_of(site)).to(next(site.module.buffers()).device)
            changes.set_attr(site.owner, site.leaf, module.train(site.module.training))
            sites = [*sites[:n], site._replace(module=module), *sites[n + 1 :]]
    return sites


def copied_configs(site: Any) -> list[Any]:
    """Configs in a model that are copies of its own, as the stacks of T5 have them."""
    if site.module is not None:
        return []
    mine = site.owner.config
    found = {id(x): x for x in (getattr(part, "config", None) for part in site.owner.modules())}
    return [x for x in found.values() if type(x) is type(mine) and x is not mine and scheme_entries(x)]


def remove_schemes(config: Any, changes: Any) -> None:
    """Give a config its own rope parameters back."""

    def own(entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        kept = {key: own(x) for key, x in entry.items() if key not in (NAME, COUNT, OWN, WAITS, BIAS)}
        return kept | ({"rope_type": entry[OWN]} if OWN in entry else {})

    for lock in LOCKS:
        if vars(config).get(lock) == NAME:
            changes.undo.append(partial(vars(config).update, {lock: vars(config).pop(lock)}))
    if hasattr(config, NAME):
        changes.set_attr(config, NAME, None)
    if rope := getattr(config, "rope_parameters", None):
        changes.set_attr(config, "rope_parameters", own(rope))


def choose_experts(model: Any, changes: Any) -> None:
    """Give a model that waited its default of experts, where its config asks for none."""
    if vars(model.config).get(EXPERTS_FIELD) == NAME:
        changes.set_attr(model.config, EXPERTS_FIELD, model._check_and_adjust_experts_implementation(None))


def choose_attention(model: Any, changes: Any) -> None:
    """Give a model that waited the attention that was asked for, or else its default."""
    asked = vars(model.config).get(ATTENTION_FIELD)
    changes.set_attr(model.config, ATTENTION_FIELD, asked)
    chosen = model._check_and_adjust_attn_implementation(asked if asked != NAME else None, is_init_check=True)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(chosen)
    setattr(model.config, ATTENTION_FIELD, chosen)


def load_learned_omega(learned: Tensor, folder: str, name: str, end: str) -> None:
    """Read a learned Omega from the weights that were saved with a config.

    Args:
        learned: the parameter to fill, (a, r) or (h, a, r).
        folder: where the model was saved.
        name: the weight's full name, taken where it is there.
        end: the end of its name, for parts that were saved alone.

    Raises:
        ValueError: no such weight, or several.
    """
    found: dict[str, Tensor] = {}
    for path in Path(folder).glob("*.safetensors") if folder else ():
        with safe_open(path, "pt") as weights:
            keys = [key for key in weights.keys() if f".{key}".endswith(f".{end}")]  # noqa: SIM118
            found |= {key: weights.get_tensor(key) for key in keys}
    found = {name: found[name]} if name in found else found
    if [omega.shape for omega in found.values()] != [learned.shape]:
        held = {key: tuple(omega.shape) for key, omega in found.items()} or "none"
        raise ValueError(
            f"the saved Omega was learned, but no *.safetensors in {folder!r} hold one of the shape "
            f"{tuple(learned.shape)} for {name!r}: {held}; set name_or_path of the model, or of the part "
            "that set_rope is given, to the folder where it, and no other part, was saved"
        )
    learned.data.copy_(next(iter(found.values())))
