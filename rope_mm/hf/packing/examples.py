"""One example to train on: what a processor makes of it, its labels, and where it may be cut."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rope_mm.hf.image_grids import IMAGES, VIDEOS, close_rows, read_grids, token_kinds

IGNORED = -100  # the label of a token that is not predicted
MASKS = (
    "attention_mask",
    "assistant_masks",
    "completion_mask",
)  # at which tokens there is something, or a loss
TOKEN_KEYS = ("input_ids", "labels", "mm_token_type_ids", "token_type_ids", *MASKS)
OURS = ("position_ids", "use_cache", "cache_position", "logits_to_keep", "inputs_embeds", *TOKEN_KEYS)
RAW = ("image", "images", "video", "videos")  # columns of data sets, which a processor reads
OPENS_IMAGE = ("vision_start_token_id", "boi_token_id", "boi_token_index", "image_start_token_id")


@dataclass(frozen=True)
class Example:
    """An example of s tokens, as its model reads it alone.

    Attributes:
        tokens: (s,) by name: input_ids, labels, and what else has a value for each token.
        media: pixels, grids and what else goes with images and videos, by name, in their order.
        kinds: (s,), 0 for text, 1 for an image, 2 for a video.
    """

    tokens: dict[str, Tensor]
    media: dict[str, Tensor]
    kinds: Tensor

    def __len__(self) -> int:
        return len(self.kinds)

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of a forward of this example alone."""
        return {name: x[None] for name, x in self.tokens.items()} | self.media


def encode_example(
    processor: Any,
    config: Any,
    known: Iterable[str],
    example: Mapping[str, Any],
    assistant_only: bool = False,
) -> Example:
    """An example as a data set has it, as its model reads it.

    Args:
        processor: a processor or a tokenizer; None where examples have input_ids.
        config: the model's, which names the tokens of images.
        known: the arguments of the model's forward; other columns are dropped.
        example: messages, prompt and completion, or text, with images and videos; or what a processor made.
        assistant_only: whether only the assistant's tokens get labels, of a template that marks them.

    Raises:
        ValueError: an example of another form, or image tokens that do not match their grids.
    """
    given = dict(example)
    if "input_ids" not in given:
        given = run_processor(processor, given, assistant_only)
    elif raw := [name for name in RAW if given.get(name) is not None and given.get(name) != []]:
        raise ValueError(
            f"an example with input_ids holds {raw[0]} that no processor has seen; give messages or text "
            "beside them, or the pixel values and grids that a processor makes of them"
        )
    tokens = {name: as_row(name, given[name]) for name in TOKEN_KEYS if given.get(name) is not None}
    lengths = {len(x) for x in tokens.values()}
    if len(lengths) != 1 or not min(lengths):
        sizes = ", ".join(f"{name} {len(x)}" for name, x in tokens.items())
        raise ValueError(f"an example needs one value for each of its tokens, not {sizes}")
    if "attention_mask" in tokens:  # padding of the example is dropped
        there = tokens["attention_mask"].bool()
        tokens = {name: x[there] for name, x in tokens.items()}
    ids, types = tokens["input_ids"], tokens.get("mm_token_type_ids")
    kinds: Any = token_kinds(config, ids[None], None if types is None else types[None])
    kinds = kinds[0]
    labels = tokens.get("labels")
    if labels is None:
        labels = ids.masked_fill(kinds > 0, IGNORED)
        for name in ("assistant_masks", "completion_mask"):
            labels = labels.masked_fill(tokens[name] == 0, IGNORED) if name in tokens else labels
    kept = {name: x for name, x in tokens.items() if name not in MASKS and name in {*known, "input_ids"}}
    if "mm_token_type_ids" in known:
        kept["mm_token_type_ids"] = kinds if types is None else types
    media = {
        name: as_media(name, given[name]) for name in known if name not in OURS and is_media(given, name)
    }
    check_grids(config, media, kinds)
    return Example(kept | {"labels": labels}, media, kinds)


def is_media(given: Mapping[str, Any], name: str) -> bool:
    """Whether an argument holds numbers of images or videos."""
    value = given.get(name)
    return isinstance(value, Tensor | list | tuple) or hasattr(value, "__array__")


def as_row(name: str, value: Any) -> Tensor:
    """Whole numbers (s,) of one example.

    Raises:
        ValueError: those of several.
    """
    row = torch.as_tensor(value).long()
    row = row[0] if row.dim() == 2 and len(row) == 1 else row
    if row.dim() != 1:
        raise ValueError(f"{name} of an example must be (s,) or (1, s), not {tuple(row.shape)}")
    return row


def as_media(name: str, value: Any) -> Tensor:
    """What goes with images, as a tensor; a grid of one image as (1, 3)."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        value = torch.stack(list(value))
    x = torch.as_tensor(value)
    return x.view(-1, 3) if name.endswith("grid_thw") else x


def check_grids(config: Any, media: Mapping[str, Tensor], kinds: Tensor) -> None:
    """Refuse grids of an example that its image tokens do not fill: in a row, the next example's would.

    Raises:
        ValueError: with both numbers of tokens.
    """
    if not any(name.endswith("grid_thw") for name in media):
        return
    seen = read_grids(config, media, kinds[None])
    for kind, what in ((IMAGES, "image"), (VIDEOS, "video")):
        tokens, room = int((kinds == kind).sum()), sum(x.tokens for x in seen[kind])
        if tokens != room:
            raise ValueError(
                f"an example has {tokens} {what} tokens, but its {what}_grid_thw are of {room}; give it the "
                "grids and the tokens of one call of the processor, not cut"
            )


def run_processor(processor: Any, example: Mapping[str, Any], assistant_only: bool) -> dict[str, Any]:
    """What a processor makes of messages, of prompt and completion, or of text.

    Raises:
        ValueError: no processor, or an example of another form.
    """
    if processor is None:
        raise ValueError(f"examples with {sorted(example)} need a processor; without one give input_ids")
    images, videos = visuals_of(example, "image"), visuals_of(example, "video")
    if "messages" in example:
        return dict(apply_template(processor, fill(example["messages"], images, videos), assistant_only))
    if "prompt" in example and "completion" in example:
        return with_completion(processor, example["prompt"], example["completion"], images, videos)
    if "text" in example:
        return dict(call_processor(processor, example["text"], images, videos))
    raise ValueError(
        f"an example has {sorted(example)}; it needs input_ids, messages, text, or prompt and completion"
    )


def visuals_of(example: Mapping[str, Any], kind: str) -> list[Any]:
    """The images or videos of an example, in its column of one or of several."""
    one = example.get(kind)
    return [*(example.get(f"{kind}s") or []), *([] if one is None else [one])]


def call_processor(processor: Any, text: str, images: list[Any], videos: list[Any]) -> Mapping[str, Any]:
    """A processor's, or a tokenizer's, answer for one text."""
    visual = {name: x for name, x in (("images", images), ("videos", videos)) if x}
    return processor(text=[text], **visual, return_tensors="pt")


def apply_template(
    processor: Any, messages: list[dict[str, Any]], assistant_only: bool, prompt: bool = False
) -> Mapping[str, Any]:
    """A processor's, or a tokenizer's, answer for a conversation.

    Raises:
        ValueError: a template that does not mark the assistant's tokens, where only these are wanted.
    """
    template = getattr(processor, "chat_template", None)
    if assistant_only and "generation" not in str(template):
        raise ValueError(
            "assistant_only_loss needs a chat template that marks the assistant's turns by {% generation %}; "
            "give such a template, or labels"
        )
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=assistant_only,
    )


def with_completion(processor: Any, prompt: Any, completion: Any, images: Any, videos: Any) -> dict[str, Any]:
    """A prompt and its completion, with labels at the completion alone.

    Raises:
        ValueError: a prompt whose tokens change by what follows.
    """
    if isinstance(prompt, str):
        whole = call_processor(processor, prompt + completion, images, videos)
        before = call_processor(processor, prompt, images, videos)["input_ids"]
    else:
        whole = apply_template(processor, fill([*prompt, *completion], images, videos), False)
        before = apply_template(processor, fill(prompt, images, videos), False, prompt=True)["input_ids"]
    ids, before = as_row("input_ids", whole["input_ids"]), as_row("input_ids", before)
    if not torch.equal(ids[: len(before)], before):
        raise ValueError(
            "the tokens of the prompt alone are not those with which prompt and completion begin, as where a "
            "tokenizer ends every text with a token; give input_ids and labels"
        )
    return {**whole, "completion_mask": (torch.arange(len(ids)) >= len(before)).long()}


def fill(messages: Any, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
    """Messages with the images and videos in their places; before the first user's text where it has none.

    Raises:
        ValueError: images or videos that are more or fewer than their places.
    """
    waiting = {"image": list(images), "video": list(videos)}
    if not images and not videos:
        return list(messages)
    filled = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
            if message["role"] == "user" and not any(has_places(other) for other in messages):
                content = [{"type": kind} for kind in waiting for _ in waiting[kind]] + content
        parts = []
        for part in content or []:
            kind = part.get("type")
            if kind in waiting and not set(part) & {kind, "url", "path", "base64"}:
                if not waiting[kind]:
                    raise ValueError(f"the messages have places for more {kind}s than the example brings")
                part = {**part, kind: waiting[kind].pop(0)}
            parts.append(part)
        filled.append({**message, "content": parts})
    if left := {kind: len(x) for kind, x in waiting.items() if x}:
        raise ValueError(f"the messages have no place for {left} of the example's images or videos")
    return filled


def has_places(message: Mapping[str, Any]) -> bool:
    """Whether a message says itself where its images and videos stand."""
    content = message.get("content")
    return not isinstance(content, str) and any(
        part.get("type") in ("image", "video") for part in content or ()
    )


def cut_example(example: Example, config: Any, limit: int) -> Example | None:
    """An example cut at text to at most `limit` tokens; an image is kept whole, or is not kept.

    Args:
        example: any.
        config: the model's.
        limit: the most tokens.

    Returns:
        The example; None where nothing is left to predict.
    """
    if len(example) <= limit:
        return example
    spans, end = media_spans(example, config), limit
    for _, begin, stop in reversed(spans):
        if begin < end < stop:
            end = begin
    opens = {getattr(config, name, None) for name in OPENS_IMAGE} - {None}
    while end and int(example.tokens["input_ids"][end - 1]) in opens:  # what it opens is cut
        end -= 1
    kept = {kind: sum(k == kind and stop <= end for k, _, stop in spans) for kind in (0, IMAGES, VIDEOS)}
    media = keep_media(example.media, spans, kept)
    tokens = {name: x[:end] for name, x in example.tokens.items()}
    if media is None or not (tokens["labels"][1:] != IGNORED).any():
        return None
    return replace(example, tokens=tokens, media=media, kinds=example.kinds[:end])


def media_spans(example: Example, config: Any) -> list[tuple[int, int, int]]:
    """Images and videos in the order of their first tokens: kind, first token, token behind the last one.

    Where their sizes are not known they are one of kind 0.
    """
    if not (example.kinds > 0).any():
        return []
    kinds, media = close_rows(config, example.media, example.kinds[None])
    try:
        seen = read_grids(config, media, kinds)
    except ValueError:
        there = example.kinds.nonzero()[:, 0].tolist()
        return [(0, there[0], there[-1] + 1)]
    spans = []
    for kind in (IMAGES, VIDEOS):
        there, first = (kinds[0] == kind).nonzero()[:, 0].tolist(), 0
        for visual in seen[kind]:
            spans.append((kind, there[first], there[first + visual.tokens - 1] + 1))
            first += visual.tokens
    return sorted(spans, key=lambda span: span[1])


def keep_media(
    media: dict[str, Tensor], spans: list[tuple[int, int, int]], kept: dict[int, int]
) -> dict[str, Tensor] | None:
    """The pixels and grids of the first images and videos; None where they cannot be separated.

    Args:
        media: of all of them.
        spans: of all of them.
        kept: how many of each kind stay.
    """
    if sum(kept.values()) == len(spans):
        return media
    if not sum(kept.values()):
        return {}
    result = {}
    for name, x in media.items():
        kind = VIDEOS if re.search("video|second", name) else IMAGES
        total, n = sum(k == kind for k, _, _ in spans), kept[kind]
        grid = media.get("video_grid_thw" if kind == VIDEOS else "image_grid_thw")
        if grid is not None and len(x) == int(grid.prod(-1).sum()) != total:
            n, total = int(grid[:n].prod(-1).sum()), len(x)
        if len(x) != total:
            return None
        if n:
            result[name] = x[:n]
    return result
