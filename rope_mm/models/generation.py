"""Words after pictures, for transformers' `generate`: what such a prompt carries from step to step."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from rope_mm.models.position_ids import unpack_position_ids


class ImageGenerationMixin(PreTrainedModel, GenerationMixin):
    """Positions, ranks and patches of prompts with pictures, through every cache."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        position_ids: Tensor | None = None,
        rank: Tensor | None = None,
        rope_deltas: Tensor | None = None,
        patches: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The next forward's inputs: places of generated words, ranks and patches of what is not cached.

        Raises:
            ValueError: positions of pictures without `rope_deltas`.
        """
        if position_ids is not None and position_ids.dim() == 3:
            if rope_deltas is None or rank is None:
                raise ValueError(
                    "position_ids (1 + axes, b, s) need rank (b, s) and rope_deltas (b,), from which "
                    "generated words go on; arrange and RopeMMProcessor make all three"
                )
            position_ids = self.go_on(position_ids, rank.shape[1], rope_deltas)
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, *args, position_ids=position_ids, **kwargs
        )
        if position_ids is not None and position_ids.dim() == 2:
            inputs["rope_deltas"] = rope_deltas
        new = inputs["input_ids"].shape[1] if inputs.get("input_ids") is not None else 0
        if rank is not None and new > 1:
            past = inputs.get("past_key_values")
            start = 0 if past is None else int(past.get_seq_length())
            inputs["rank"] = extend_block_ids(rank, start + new)[:, start:]
        if patches is not None:
            inputs["patches"] = self.not_cached(patches, input_ids, input_ids.shape[1] - new)
        return inputs

    def go_on(self, position_ids: Tensor, prompt: int, deltas: Tensor) -> Tensor:
        """Position ids (1 + a, b, s) whose columns after the prompt are those of words."""
        count = position_ids[0, :, prompt:]
        _, words = unpack_position_ids(count, self.config.scheme, deltas)
        after = torch.cat([count[None], words.movedim(-1, 0).to(position_ids)])
        return torch.cat([position_ids[..., :prompt], after], -1)

    def not_cached(self, patches: Tensor, ids: Tensor, past: int) -> Tensor | None:
        """Of the patches of all ids (b, s) those that stand after the first `past`."""
        rows, columns = (ids == self.config.image_token_id).nonzero().T
        late = patches.flatten(0, -2)
        if len(late) == len(rows):  # otherwise the embedding tells what is wrong
            late = late[columns >= past]
        return late if len(late) else None

    def _expand_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        patches = kwargs.pop("patches", None)
        ids, kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        if patches is not None and input_ids is not None:  # those of each row again, in the order of rows
            flat, counts = patches.flatten(0, -2), (input_ids == self.config.image_token_id).sum(1).tolist()
            rows = flat.split(counts) if len(flat) == sum(counts) else [flat]  # which the embedding refuses
            kwargs["patches"] = torch.cat([row for row in rows for _ in range(expand_size)])
        return ids, kwargs

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Any, *args: Any, **kw: Any
    ):
        """The mask of one more word; those of several are made in the forward, which knows their ranks."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        kw.pop("position_ids", None)
        return create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kw)


def extend_block_ids(rank: Tensor, length: int) -> Tensor:
    """Ranks (b, length) of a prompt (b, s) and the words after it, each above all before it."""
    more = torch.arange(1, max(length - rank.shape[1], 0) + 1, device=rank.device)
    return torch.cat([rank, rank.amax(1, keepdim=True) + more], 1)[:, :length]
