"""Small forwards that prove a change of a model: what they are given, and what they must answer."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rope_mm.checks.arguments import parameters_of
from rope_mm.hf.attention_positions import pixel_grids
from rope_mm.hf.image_positions import image_size
from rope_mm.hf.rotary_embedding import RopeMMRotaryEmbedding
from rope_mm.hf.rotary_inspection import APPLY_FUNCTION, modules_using


def probe_inputs(owner: Any) -> dict[str, Any]:
    """Inputs of a small forward: noise or ids for 8 tokens, or an image or a video of the size it reads.

    Raises:
        ValueError: a model that reads something else.
    """
    config, name, takes = owner.config, owner.main_input_name, parameters_of(type(owner))
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(1, *size, generator=generator).to(owner.device, owner.dtype)

    whole = "decoder_input_ids" in takes
    if name in ("pixel_values", "pixel_values_videos"):
        given = probe_pixels(owner, noise)
    elif "inputs_embeds" in takes and not whole:
        given = {"inputs_embeds": noise(8, owner.get_input_embeddings().weight.shape[-1]), "use_cache": False}
    elif name == "input_values" and hasattr(config, "frequency_stride"):  # a spectrogram
        given = {name: noise(config.max_length, config.num_mel_bins)}
    elif name == "input_values":  # a wave of sound, long enough for all convolutions
        given = {name: noise(64 * math.prod(getattr(config, "conv_stride", (8,))))}
    elif name == "input_features" and hasattr(
        config, "max_source_positions"
    ):  # twice as long as its positions
        given = {name: noise(config.num_mel_bins, 2 * config.max_source_positions)}
    elif name == "past_values":
        given = {name: noise(config.context_length, config.num_input_channels)}
    elif name == "input_ids":
        given = {name: torch.arange(8, device=owner.device)[None]}
    else:
        raise ValueError(
            f"{type(owner).__name__} reads {name}, for which there is no probe to prove the change; it is "
            "not served"
        )
    if whole:
        given |= {"decoder_input_ids": torch.arange(5, device=owner.device)[None], "use_cache": False}
    return given


def probe_pixels(owner: Any, noise: Callable[..., Tensor]) -> dict[str, Any]:
    """An image of 2 x 3 patches or of the one size that a model reads, or a video."""
    config, channels = owner.config, getattr(owner.config, "num_channels", 3)
    if "spatial_shapes" in parameters_of(type(owner)):  # patches of images of any shape (SigLIP 2)
        mask, shapes = torch.ones(1, 6, dtype=torch.long), torch.tensor([[2, 3]])
        pixels = {"pixel_values": noise(6, channels * config.patch_size**2)}
        names = {"pixel_attention_mask": mask, "attention_mask": mask, "spatial_shapes": shapes}
        return pixels | {n: x.to(owner.device) for n, x in names.items() if n in parameters_of(type(owner))}
    free = modules_using(owner, APPLY_FUNCTION)  # from tables of positions, which fit one size
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    patches = image_size(config, 2, 3) if hasattr(config, "patch_size") else 64
    image = patches if free or size is None else size
    y, x = image if isinstance(image, Iterable) else (image, image)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    return {owner.main_input_name: noise(*([frames] if frames else []), channels, y, x)}


@torch.no_grad()
def find_first_patch(owner: Any, attentions: list[nn.Module]) -> int | None:
    """How many tokens stand before the patches of an image: only the token of a changed patch changes.

    Returns:
        None where the first attention sees as many tokens as there are patches, or fewer.

    Raises:
        ValueError: tokens besides the patches, and a changed patch that changes other tokens than its own.
    """
    given = probe_inputs(owner)
    name = owner.main_input_name
    if (
        given[name].dim() < 4
        or not hasattr(owner.config, "patch_size")
        or "noise" in parameters_of(type(owner))
    ):
        return None
    states: list[Tensor] = []

    def record(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    (grid,), seen = pixel_grids(owner.config, given), []
    y, x = image_size(owner.config, 1, 1)
    for corner in (None, (slice(0, y), slice(0, x)), (slice(-y, None), slice(-x, None))):
        pixels = given[name].clone()
        if corner:
            pixels[..., corner[0], corner[1]] += 1
        hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in attentions]
        try:
            run(owner, {**given, name: pixels})
        finally:
            for hook in hooks:
                hook.remove()
        seen.append(states[0])
        states.clear()
    if seen[0].dim() != 3 or seen[0].shape[1] <= math.prod(grid):
        return None
    first, last = (set((x != seen[0]).any(-1)[0].nonzero()[:, 0].tolist()) for x in seen[1:])
    frames, area = (grid[0], math.prod(grid[1:])) if len(grid) == 3 else (1, math.prod(grid))
    start = min(first, default=0)
    if first != {start + n * area for n in range(frames)} or last != {n + area - 1 for n in first}:
        raise ValueError(
            f"which tokens of {type(owner).__name__} are its patches cannot be seen; it is not served"
        )
    return start


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation; afterwards every module is in its mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def run(owner: Any, inputs: dict[str, Any]) -> Any:
    """The first output of a model in evaluation."""
    with evaluating(owner):
        return owner(**inputs)[0]


@torch.no_grad()
def probe(owner: Any) -> list[Tensor]:
    """Outputs of a small forward: of the first attention that calls a rotary function, and of the model."""
    recorded: list[Tensor] = []
    first = modules_using(owner, APPLY_FUNCTION)[:1]
    hooks = [module.register_forward_hook(lambda *call: recorded.append(call[-1][0])) for module in first]
    try:
        stream = run(owner, probe_inputs(owner))
    finally:
        for hook in hooks:
            hook.remove()
    return [*recorded, stream if isinstance(stream, Tensor) else stream[-1]]  # of a backbone's maps the last


def check_equal_answers(before: list[Tensor], after: list[Tensor]) -> None:
    """Refuse outputs of a first attention, or of a model, that differ by more than rounding."""
    for times, one, other in zip((8, 256), before, after, strict=True):
        error, eps = ((one - other).norm() / one.norm()).item(), torch.finfo(one.dtype).eps
        if not error <= times * eps:
            raise ValueError(f"the outputs of the probe differ by {error:.1e} of their norm")


def can_be_probed(owner: Any) -> bool:
    """Whether a small forward runs on a part as it is."""
    tensors = [*owner.parameters(), *owner.buffers()]
    if any(x.is_meta for x in tensors) or not hasattr(owner, "main_input_name"):
        return False
    if any(hasattr(x, "placements") for x in tensors):
        return False  # shards: a part's own forward would gather them as if it were the whole model
    try:
        probe(owner)
    except Exception:  # inputs of another kind, or sizes that the probe does not know
        return False
    return True


def prove_call(owner: Any, rotary: RopeMMRotaryEmbedding) -> None:
    """Run a small forward, to see that it calls our module.

    Raises:
        ValueError: a forward that does not call it; or whatever the forward raises.
    """
    calls: list[int] = []
    hook = rotary.register_forward_hook(lambda *_: calls.append(1))
    try:
        probe(owner)
    finally:
        hook.remove()
    if not calls:
        raise ValueError(f"{type(owner).__name__} does not call its rotary module; it is not served")
