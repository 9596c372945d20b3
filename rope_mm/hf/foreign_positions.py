"""Positions of another rule: where images stand by our layout, they would be wrong without a word."""

from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.hf.image_grids import SIZES, token_kinds
from rope_mm.hf.position_ids import place_inputs
from rope_mm.schemes.scheme import Scheme


def refuse_foreign_positions(
    module: nn.Module, scheme: Scheme | None, ids: Tensor | None, kwargs: dict[str, Any], cache: Any
) -> None:
    """Refuse position_ids of another rule, where images stand by our layout.

    Args:
        module: the model, whose config names the tokens of images.
        scheme: the scheme that places tokens; None where the model keeps its own rope.
        ids: position_ids (b, s) or (n, b, s), None if none were given.
        kwargs: the forward's arguments.
        cache: the forward's cache, None without one.

    Raises:
        ValueError: whole numbers that are not those of the layout, or token positions alone with an image.
    """
    if ids is None or scheme is None or scheme.layout == "flat" or torch.compiler.is_compiling():
        return
    shape, remedy = tuple(ids.shape), "give none, or those of `positions_for`, which are floats"
    as_text = (
        f"position_ids {shape} would place an image as text, and not by layout {scheme.layout!r}; {remedy}"
    )
    if ids.dim() != 3:
        if has_images(kwargs) or shows_images(module, kwargs):
            raise ValueError(as_text)
        return
    axes = ids[-len(scheme.axes) :] if len(ids) == 1 + len(scheme.axes) else ids[-3:]
    floats = ids.is_floating_point()
    if floats and ids.element_size() < 4:  # refused by the rotation, with its own reason
        return
    images = shows_images(module, kwargs)
    if floats and (not images or (axes % 1 != 0).any()):
        return
    differ = bool((axes != axes[:1]).any())
    if not images and not differ:
        return
    filled = cache is not None and int(cache.get_seq_length())
    ours = None if filled else made_by_layout(module, scheme, ids, kwargs)
    if ours or (ours is None and floats):
        return
    if not differ and len(scheme.axes) > 1:
        raise ValueError(as_text)
    raise ValueError(
        f"these position_ids {shape} are whole numbers, as another rule makes them, not by layout "
        f"{scheme.layout!r}; {remedy}"
    )


def has_images(kwargs: dict[str, Any]) -> bool:
    """Whether a forward is given an image or a video."""
    names = ("pixel_values", "image_", "video_")
    return any(name.startswith(names) and value is not None for name, value in kwargs.items())


def shows_images(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether tokens of images or videos are among those of this forward."""
    kinds = token_kinds(module.config, kwargs.get("input_ids"), kwargs.get("mm_token_type_ids"))
    if kinds is not None:
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        return bool(kinds[:, -tokens.shape[1] :].any()) if tokens is not None else False
    return any(name.startswith("pixel_values") and value is not None for name, value in kwargs.items())


def made_by_layout(module: Any, scheme: Scheme, ids: Tensor, kwargs: dict[str, Any]) -> bool | None:
    """Whether position_ids (n, b, s) are those of the layout, up to a shift; None where it cannot place them.

    Documents in a row, which token numbers tell apart, may each begin elsewhere.
    """
    a, mask = len(scheme.axes), kwargs.get("attention_mask")
    inputs = {name: kwargs.get(name) for name in (*SIZES, "mm_token_type_ids", "cu_seq_lens_q")}
    if len(ids) == 1 + a:
        inputs["position_ids"] = ids[0].floor()
    mask = mask if getattr(mask, "ndim", 0) == 2 else None
    try:
        placed = place_inputs(module.config, scheme, kwargs.get("input_ids"), mask, **inputs)
    except ValueError:
        return None
    if len(ids) not in (1, a, 1 + a):
        return False
    given = (ids if len(ids) == 1 else ids[-a:]).to(placed.positions).movedim(0, -1)
    given = given.expand(placed.positions.shape)
    first = placed.mask & (placed.begins | (placed.mask.long().cumsum(-1) == 1))
    if not first.any():
        return True
    document = first.view(-1).long().cumsum(0).sub(1).clamp(min=0)
    shift = (given - placed.positions)[first][document].view_as(given)
    close = torch.isclose(given, placed.positions + shift, rtol=1e-6, atol=1e-3).all(-1)
    return bool((close | ~placed.mask).all())
