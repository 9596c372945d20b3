"""Positions at the border of transformers: (1 + a, b, s), the token positions first, then one row an axis."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.positions import place_rows
from rope_mm.scheme import Scheme
from rope_mm.segments import Image, Segment, Text, Video

Story = str | Sequence[Segment]
ENDS_IN_PICTURE = (
    "the prompt ends in a picture, and the word behind it does not stand one step further on; end it with a "
    "word, such as the token that closes a picture"
)


def positions_for(
    model: nn.Module, what: Sequence[Story] | Mapping[str, Any], padding_side: str = "right"
) -> Tensor:
    """position_ids (1 + a, b, s) of stories, or of what a processor made, by the scheme that a model runs.

    A row that ends where the next word is not one step ahead, as behind a picture, says so by a quarter in
    its last token position, so that `generate`, which takes one step, can be refused.

    Args:
        model: a model that `set_rope` gave a scheme.
        what: a story for each row, or a dict with input_ids, grids and, of padded rows, attention_mask.
        padding_side: of stories of unequal lengths.

    Raises:
        ValueError: a model without a scheme of ours, or tokens that do not match their grids.
    """
    from rope_mm.hf.swap import scheme_of

    scheme = scheme_of(model)
    if isinstance(what, Mapping):
        positions, mask, ahead = place_inputs(model.config, scheme, **what)
        after = ahead.to(positions) + mask.sum(-1, keepdim=True)
    else:
        rows = place_rows(what, scheme.layout, padding_side=padding_side, **dict(scheme.options))
        positions, mask = rows.positions, rows.mask
        after = positions.new_tensor([[cursor.next] for cursor in rows.cursors])
    tokens = (mask.long().cumsum(-1) - 1).clamp(min=0).to(positions)
    tokens[:, -1] += 0.25 * (mask[:, -1] & strays(positions[:, -1] + 1, after))
    return torch.cat((tokens[None], positions.movedim(-1, 0)))


def strays(step: Tensor, after: Tensor) -> Tensor:
    """Whether one step (b, a) leads elsewhere than to the next word (b, 1), for each row."""
    return ~torch.isclose(step, after, rtol=0, atol=1e-6).all(-1)


def place_inputs(
    config: Any, scheme: Scheme, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (b, s, a), which tokens are there (b, s), and how far the next word is ahead of them (b, 1).

    Raises:
        ValueError: tokens of images that do not match their grids.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    kinds = inputs.get("mm_token_type_ids")
    if kinds is None:
        images, videos = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video"))
        kinds = (input_ids == (-1 if images is None else images)).int()
        kinds += 2 * (input_ids == (-1 if videos is None else videos)).int()
    queues = read_grids(config, inputs)
    positions = torch.zeros(*input_ids.shape, len(scheme.axes), dtype=torch.float64)
    ahead = []
    for row, (seen, there) in enumerate(zip(kinds.cpu(), mask.bool().cpu(), strict=True)):
        placed, cursor = scheme.place(read_story(seen[there], queues))
        positions[row, there] = placed
        ahead.append(cursor.next - cursor.tokens)
    if left := [str(seen) for queue in queues.values() for seen in queue]:
        raise ValueError(
            f"grids came for {', '.join(left)}, but there are no tokens left for them to stand on"
        )
    wide = torch.float32 if input_ids.device.type == "mps" else torch.float64
    moved = (x.to(input_ids.device) for x in (positions.to(wide), mask.bool(), torch.tensor(ahead)[:, None]))
    return tuple(moved)  # pyright: ignore[reportReturnType]


def read_grids(config: Any, inputs: Mapping[str, Any]) -> dict[int, list[Segment]]:
    """Images (key 1) and videos (key 2) in their order, in merged patches."""
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)

    def grids(name: str) -> list[list[int]]:
        told = inputs.get(name)
        return (
            []
            if told is None
            else [[t, y // merge, x // merge] for t, y, x in torch.as_tensor(told).tolist()]
        )

    seconds = inputs.get("second_per_grid_ts")
    videos = grids("video_grid_thw")
    paces = [1.0] * len(videos) if seconds is None else [float(pace) for pace in seconds]
    queues: dict[int, list[Segment]] = {
        1: [Image(y, x) if t == 1 else Video(t, y, x) for t, y, x in grids("image_grid_thw")],
        2: [Video(t, y, x, pace) for (t, y, x), pace in zip(videos, paces, strict=True)],
    }
    return queues


def read_story(kinds: Tensor, queues: dict[int, list[Segment]]) -> list[Segment]:
    """Segments of one row from the kinds of its tokens, taking grids from the queues.

    Raises:
        ValueError: a run of tokens that no grid fills.
    """
    story: list[Segment] = []
    for kind, run in zip(
        *(x.tolist() for x in torch.unique_consecutive(kinds, return_counts=True)), strict=True
    ):
        if kind == 0:
            story.append(Text(run))
            continue
        while run:  # pictures may follow one another without a word between
            seen = queues[kind].pop(0) if queues[kind] else None
            if isinstance(seen, Video) and seen.y * seen.x == run < seen.tokens:  # told frame by frame
                if seen.t > 1:
                    queues[kind].insert(0, Video(seen.t - 1, seen.y, seen.x, seen.seconds))
                seen = Image(seen.y, seen.x)
            if seen is None or seen.tokens > run:
                raise ValueError(
                    f"{run} image or video tokens stand in a row, but "
                    + (f"{seen} needs {seen.tokens}" if seen else "no grid is left for them")
                    + "; give the grids with which the processor laid the tokens out"
                )
            story.append(seen)
            run -= seen.tokens
    return story


def get_rope_index(self: Any, input_ids: Tensor, *args: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """In place of a model's own method: positions (a, b, s) by our layout, and how far words are ahead."""
    from rope_mm.hf.swap import scheme_of

    positions, _, ahead = place_inputs(self.config, scheme_of(self), input_ids, **inputs)
    return positions.movedim(-1, 0), ahead


def prepare_positions(self: Any, inputs: Tensor, given: dict[str, Any]) -> Tensor:
    """In place of a model's own method: its positions of a prompt, where `generate` can go on from them.

    Raises:
        ValueError: a prompt that ends where the next word is not one step ahead.
    """
    ids = type(self)._prepare_position_ids_for_generation(self, inputs, given)
    if len(ids) > 1 and ids.dim() == 3:
        tokens, last = ids[0, :, -1:], ids[1:, :, -1].T
        if strays(last, tokens + self.model.rope_deltas.to(tokens)).any():
            raise ValueError(ENDS_IN_PICTURE)
    return ids


METHODS = {"get_rope_index": get_rope_index, "_prepare_position_ids_for_generation": prepare_positions}
