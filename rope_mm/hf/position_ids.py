"""position_ids (1 + a, b, s) as transformers takes them: token positions first, then one row per axis."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.hf.rotary_embedding import ENDS_IN_IMAGE, scheme_of
from rope_mm.positions.place import place_rows
from rope_mm.rotary.definition import widest_float
from rope_mm.schemes.scheme import Scheme
from rope_mm.segments import Image, Segment, Video, segments_from_token_types

IMAGES, VIDEOS = 1, 2  # kinds of tokens, as processors number them


def positions_for(
    model: nn.Module,
    inputs: Sequence[str | Sequence[Segment]] | Mapping[str, Any],
    padding_side: str = "right",
) -> Tensor:
    """position_ids of segments, or of what a processor made, by the scheme that a model runs.

    A row that ends where the next token is not one step ahead, as behind an image, says so by a quarter in
    its last token position, so that `generate`, which takes one step, can be refused.

    Args:
        model: a model that `set_rope` gave a scheme.
        inputs: segments for each row, as text or as a list, or a dict with input_ids, grids and, of padded
            rows, attention_mask, as a processor makes it.
        padding_side: "right" or "left", where segments make rows of unequal lengths.

    Returns:
        (1 + a, b, s): token positions, then the position on each axis.

    Raises:
        ValueError: a model without a scheme of ours, or tokens that do not match their grids.
    """
    scheme = scheme_of(model)
    if (
        "input_ids" not in inputs
        if isinstance(inputs, Mapping)
        else any(isinstance(x, Segment) for x in inputs)
    ):
        raise ValueError(
            f"{inputs!r} is neither a list of rows of segments, as [[Text(3), Image(2, 2)]], nor what a "
            "processor makes, which has input_ids"
        )
    if isinstance(inputs, Mapping):
        positions, mask, ahead = place_inputs(model.config, scheme, **inputs)
        after = ahead.to(positions) + mask.sum(-1, keepdim=True)
    else:
        rows = place_rows(inputs, scheme.layout, padding_side=padding_side, **dict(scheme.options))
        positions, mask = rows.positions, rows.mask
        after = positions.new_tensor([[cursor.next] for cursor in rows.cursors])
    tokens = (mask.long().cumsum(-1) - 1).clamp(min=0).to(positions)
    tokens[:, -1] += 0.25 * (mask[:, -1] & off_text_step(positions[:, -1] + 1, after))
    return torch.cat((tokens[None], positions.movedim(-1, 0)))


def off_text_step(step: Tensor, after: Tensor) -> Tensor:
    """Whether one step (b, a) leads elsewhere than to the next token (b, 1), for each row."""
    return ~torch.isclose(step, after, rtol=0, atol=1e-6).all(-1)


def get_rope_index(self: Any, input_ids: Tensor, *_args: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Replaces a model's own method: positions (a, b, s) by our layout, and the rope delta (b, 1)."""
    positions, _, ahead = place_inputs(self.config, scheme_of(self), input_ids, **inputs)
    return positions.movedim(-1, 0), ahead


def prepare_positions(self: Any, inputs: Tensor, given: dict[str, Any]) -> Tensor:
    """Replaces a model's own method: its positions of a prompt, if `generate` can go on from them."""
    ids = type(self)._prepare_position_ids_for_generation(self, inputs, given)
    if len(ids) > 1 and ids.dim() == 3:
        tokens, last = ids[0, :, -1:], ids[1:, :, -1].T
        if off_text_step(last, tokens + self.model.rope_deltas.to(tokens)).any():
            raise ValueError(ENDS_IN_IMAGE)
    return ids


METHODS = {"get_rope_index": get_rope_index, "_prepare_position_ids_for_generation": prepare_positions}


def position_methods(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parts of a model that places images itself, and the methods with which they do."""
    found = [(part, name) for part in model.modules() for name in METHODS if hasattr(type(part), name)]
    return found if "get_rope_index" in {name for _, name in found} else []


def place_inputs(
    config: Any, scheme: Scheme, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Place what a processor made.

    Args:
        config: the model's config, which names the tokens of images.
        scheme: its layout places them.
        input_ids: (b, s).
        attention_mask: (b, s), 0 at padding.
        inputs: mm_token_type_ids, image_grid_thw, video_grid_thw, second_per_grid_ts.

    Returns:
        Positions (b, s, a), which tokens are no padding (b, s), and how far the next token's position is
        ahead of its number (b, 1).

    Raises:
        ValueError: tokens of images that do not match their grids.
    """
    mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
    kinds, seen = inputs.get("mm_token_type_ids"), read_grids(config, inputs)
    if kinds is None:
        kinds = torch.zeros_like(input_ids)
        for kind, name in ((IMAGES, "image_token_id"), (VIDEOS, "video_token_id")):
            kinds[input_ids == getattr(config, name, None)] = kind
    positions = torch.zeros(*input_ids.shape, len(scheme.axes), dtype=torch.float64)
    ahead = torch.zeros(len(input_ids), 1)
    for row, (kind, there) in enumerate(zip(kinds.cpu(), mask.cpu(), strict=True)):
        placed, cursor = scheme.place(segments_from_token_types(kind[there].tolist(), seen))
        positions[row, there], ahead[row] = placed, cursor.next - cursor.tokens
    if left := [str(visual) for visuals in seen.values() for visual in visuals]:
        came = ", ".join(left)
        raise ValueError(f"grids came for {came}, but there are no tokens left for them to stand on")
    return positions.to(input_ids.device, widest_float(input_ids.device)), mask, ahead.to(input_ids.device)


def read_grids(config: Any, inputs: Mapping[str, Any]) -> dict[int, list[Segment]]:
    """Images and videos in their order, in merged patches."""
    side = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    merge = torch.tensor((1, side, side))
    grids = [inputs.get(f"{kind}_grid_thw") for kind in ("image", "video")]
    images, videos = ([] if x is None else (torch.as_tensor(x).cpu() // merge).tolist() for x in grids)
    paces = inputs.get("second_per_grid_ts")
    paces = [1.0] * len(videos) if paces is None else map(float, paces)
    return {
        IMAGES: [Video(t, y, x) if t > 1 else Image(y, x) for t, y, x in images],
        VIDEOS: [Video(t, y, x, pace) for (t, y, x), pace in zip(videos, paces, strict=True)],
    }
