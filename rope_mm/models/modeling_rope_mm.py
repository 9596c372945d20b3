"""The small multimodal transformer: text, images and videos in; logits and patches, or a score, out."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack  # pyright: ignore[reportAttributeAccessIssue]
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from rope_mm.checks.arguments import (
    ALIASES,
    cache_of,
    read,
    refuse_arrays,
    refuse_unknown,
    spelling,
    takes_any_name,
)
from rope_mm.models.masks import find_document_ids, make_mask
from rope_mm.models.position_ids import default_position_ids, unpack_position_ids
from rope_mm.models.varlen import VarlenMask
from rope_mm.nn.attention import Attention, eager_attention
from rope_mm.nn.blocks import Block, PatchHead, ScoreHead
from rope_mm.nn.patches import PatchEmbedding, TokenEmbedding
from rope_mm.rotary.dispatch import RotaryAngles
from rope_mm.rotary.module import Rotary

from .configuration_rope_mm import RopeMMConfig  # beside this file also where a saved model brings its code

CACHE = spelling(vars(GenerationMixin)["prepare_inputs_for_generation"], "cache") or "cache"  # layers' name


@dataclass
class RopeMMOutput(CausalLMOutputWithPast):
    """What `RopeMMForConditionalGeneration` returns.

    Attributes:
        loss: of the text tokens, where labels were given.
        logits: (b, s, vocab) or those that were asked for.
        cache: the cache; its name is `past_key_values` before transformers 5.24.
        hidden_states: (b, s, c) of every layer, where asked for.
        attentions: weights (b, h, s, s) of every layer, where asked for.
        patches: (n, p), read at the image tokens, where patches were given.
        last_hidden_state: the stream (b, s, c).
    """

    patches: Tensor | None = None
    last_hidden_state: Tensor | None = None


class RopeMMAttention(Attention):
    """Attention with transformers' caches and backends."""

    is_causal = True  # what a backend does where it is given no mask

    def __init__(self, config: RopeMMConfig, layer_idx: int):
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        super().__init__(config.hidden_size, heads, kv_heads, config.head_dim, config.rms_norm_eps)
        self.config, self.layer_idx, self.num_key_value_groups = config, layer_idx, heads // kv_heads

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        cache = kwargs.pop(CACHE, None)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        backend, kwargs = backend_of(self.config), kwargs | {"scaling": self.head_dim**-0.5}
        if isinstance(mask, VarlenMask):
            return mask.attend(backend, self, q, k, v, **kwargs)
        return backend(self, q, k, v, mask, **kwargs)


def backend_of(config: PreTrainedConfig) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function of transformers that a config names."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation or "sdpa", eager_attention)


class RopeMMBlock(GradientCheckpointingLayer, Block):
    """A block that can be recomputed in the backward pass instead of being kept."""


class RopeMMPreTrainedModel(PreTrainedModel):
    """What all models share: the config, the initialisation, what transformers may do with them."""

    config_class = RopeMMConfig
    base_model_prefix = "model"
    _no_split_modules = ["RopeMMBlock"]
    _skip_keys_device_placement = list(ALIASES["cache"])
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # a forward compiles whole; `generate` is untried
    supports_gradient_checkpointing = True
    _can_record_outputs = {"hidden_states": RopeMMBlock, "attentions": RopeMMAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, Rotary):
            # transformers before 5.13 also asks this for weights that it has just loaded, and marks them
            if not any(getattr(weight, "_is_hf_initialized", False) for weight in module.parameters()):
                module.reset_parameters()
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            own = self.config.patch_initializer_range if isinstance(module, PatchEmbedding) else 0.0
            nn.init.normal_(module.weight, std=own or self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def check_arguments(self, arguments: Mapping[str, Any], known: frozenset[str]) -> None:
        """Refuse arguments that neither transformers nor the attention backend has; they would be ignored.

        Raises:
            ValueError: with the nearest known name.
        """
        if unknown := {name: value for name, value in arguments.items() if name not in known}:
            refuse_unknown(unknown, known | (names_of(backend_of(self.config)) - BACKEND_INPUTS))


class RopeMMModel(RopeMMPreTrainedModel):
    """The transformer without a head."""

    def __init__(self, config: RopeMMConfig):
        super().__init__(config)
        width, eps, scheme = config.hidden_size, config.rms_norm_eps, config.scheme
        self.embed = TokenEmbedding(config.vocab_size, width, config.patch_width)
        self.rotary = Rotary(
            config.head_dim, scheme, heads=config.num_key_value_heads if scheme.per_head else None
        )
        self.blocks = nn.ModuleList(
            RopeMMBlock(width, config.intermediate_size, RopeMMAttention(config, layer), eps)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(width, eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed.tokens

    def set_input_embeddings(self, value: nn.Module):
        self.embed.tokens = value  # pyright: ignore[reportAttributeAccessIssue]

    @takes_any_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        patches: Tensor | None = None,
        block_ids: Tensor | None = None,
        rope_deltas: Tensor | None = None,
        document_ids: Tensor | None = None,
        angles: RotaryAngles | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """The stream (b, s, c) of a batch; `build_batch` and `RopeMMProcessor` make all of these arguments.

        Args:
            input_ids: (b, s), `image_token_id` where a patch stands.
            attention_mask: (b, past + s), 0 at padding.
            position_ids: (1 + a, b, s), row 0 the numbers of the tokens, then their positions on each axis;
                or (b, s), numbers of text tokens. A document begins where the numbers do not rise by one.
            cache: a cache to read and to fill; `past_key_values` is its older name.
            inputs_embeds: (b, s, c) instead of input_ids.
            patches: (b, n, p) or (n, p), one for every image token, in order.
            block_ids: (b, s), see `make_mask_fn`; None where all tokens are text.
            rope_deltas: (b,), by how much text tokens stand beyond their numbers.
            document_ids: (b, s), of packed documents; else position_ids or cu_seq_lens_q say where they end.
            angles: `model.rotary.angles(positions)` made before, for models that share it; position_ids then
                only number the tokens.
            use_cache: whether to return a cache; a forward by itself makes none.
            kwargs: of transformers or the attention backend, such as `cu_seq_lens_q`, ends of documents.

        Raises:
            ValueError: an unknown argument, patches that do not fit their image tokens, packed documents with
                a cache, an Omega that depends on the length with a cache.
        """
        self.check_arguments(kwargs, MODEL_ARGUMENTS)
        refuse_arrays(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            patches=patches,
            block_ids=block_ids,
            rope_deltas=rope_deltas,
            document_ids=document_ids,
        )
        x = self.embed_inputs(input_ids, inputs_embeds, patches)
        cache = DynamicCache(config=self.config) if use_cache and cache is None else cache
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = default_position_ids(x, attention_mask, past)
        numbers, angles = self.make_angles(position_ids, rope_deltas, angles, x.dtype)
        if document_ids is None:
            document_ids = find_document_ids(numbers, attention_mask, kwargs.get("cu_seq_lens_q"))
        self.check_cache(cache, document_ids)
        mask = make_mask(self.config, x, attention_mask, cache, block_ids, document_ids)
        for block in self.blocks:
            x = block(x, angles, mask, **{CACHE: cache}, position_ids=numbers, **kwargs)
        return BaseModelOutputWithPast(self.norm(x), cache)

    def embed_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, patches: Tensor | None
    ) -> Tensor:
        """The stream (b, s, c) of token ids or token vectors, patches (n, p) at the image tokens."""
        image_mask = self.image_mask(input_ids, inputs_embeds)
        x = self.embed.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return self.embed(x, patches, image_mask)

    def make_angles(
        self,
        position_ids: Tensor,
        rope_deltas: Tensor | None,
        angles: RotaryAngles | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, RotaryAngles]:
        """Token numbers (b, s), and the angles of every layer: those given, or made of the positions."""
        if angles is not None:
            return (position_ids if position_ids.dim() == 2 else position_ids[0]).long(), angles
        numbers, positions = unpack_position_ids(position_ids, self.rotary.scheme, rope_deltas)
        with record_function("rotary angles"):  # the name under which a profile shows it
            return numbers, self.rotary.angles(positions, dtype)

    def image_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Where (b, s) image tokens are, among ids or among their vectors."""
        if input_ids is not None and inputs_embeds is None:
            return input_ids == self.config.image_token_id
        if inputs_embeds is not None and input_ids is None:
            return (inputs_embeds == self.embed.tokens.weight[self.config.image_token_id]).all(-1)
        raise ValueError("give either input_ids or inputs_embeds")

    def check_cache(self, cache: Cache | None, document_ids: Tensor | None) -> None:
        """Refuse inputs that do not fit the cache, if there is one."""
        if cache is None:
            return
        if document_ids is not None:
            raise ValueError(
                "packed documents cannot be cached: a later token would see them all; pass use_cache=False"
            )
        if self.rotary.scheme.needs_length:
            raise ValueError(
                "this scheme's Omega depends on the length, so cached keys would be rotated otherwise than "
                "new ones; pass use_cache=False"
            )


class ImageGenerationMixin(PreTrainedModel, GenerationMixin):
    """For `generate`: positions, block ids and patches of prompts with images, from step to step."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        position_ids: Tensor | None = None,
        block_ids: Tensor | None = None,
        rope_deltas: Tensor | None = None,
        patches: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The next forward's arguments: positions of generated tokens, blocks and patches of uncached ones.

        Raises:
            ValueError: positions of images without `rope_deltas`.
        """
        if position_ids is not None and position_ids.dim() == 3:
            if rope_deltas is None or block_ids is None:
                raise ValueError(
                    "position_ids (1 + axes, b, s) need block_ids (b, s) and rope_deltas (b,), from which "
                    "generated tokens continue; build_batch and RopeMMProcessor make all three"
                )
            position_ids = self.continue_position_ids(position_ids, block_ids.shape[1], rope_deltas)
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, *args, position_ids=position_ids, **kwargs
        )
        if position_ids is not None and position_ids.dim() == 2:
            inputs["rope_deltas"] = rope_deltas
        new = inputs["input_ids"].shape[1] if inputs.get("input_ids") is not None else 0
        if block_ids is not None and new > 1:
            past = read(inputs, "cache")
            start = 0 if past is None else int(past.get_seq_length())
            inputs["block_ids"] = extend_block_ids(block_ids, start + new)[:, start:]
        if patches is not None:
            inputs["patches"] = self.uncached_patches(patches, input_ids, input_ids.shape[1] - new)
        return inputs

    def continue_position_ids(self, position_ids: Tensor, prompt: int, rope_deltas: Tensor) -> Tensor:
        """Position ids (1 + a, b, s) whose columns after the prompt are those of text."""
        numbers = position_ids[0, :, prompt:]
        _, positions = unpack_position_ids(numbers, self.config.scheme, rope_deltas)
        after = torch.cat([numbers[None], positions.movedim(-1, 0).to(position_ids)])
        return torch.cat([position_ids[..., :prompt], after], -1)

    def uncached_patches(self, patches: Tensor, ids: Tensor, past: int) -> Tensor | None:
        """Of the patches of all ids (b, s) those that stand after the first `past`."""
        rows, columns = (ids == self.config.image_token_id).nonzero().T
        uncached = patches.flatten(0, -2)
        if len(uncached) == len(rows):  # otherwise the embedding refuses them
            uncached = uncached[columns >= past]
        return uncached if len(uncached) else None

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
        if patches is not None and input_ids is not None:  # each row's patches again, in the order of rows
            flat, counts = patches.flatten(0, -2), (input_ids == self.config.image_token_id).sum(1).tolist()
            rows = flat.split(counts) if len(flat) == sum(counts) else [flat]  # which the embedding refuses
            kwargs["patches"] = torch.cat([row for row in rows for _ in range(expand_size)])
        return ids, kwargs

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Any, *args: Any, **kw: Any
    ):
        """The mask of one more token; that of several is made in the forward, which knows their blocks."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        kw.pop("position_ids", None)
        return create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kw)


def extend_block_ids(block_ids: Tensor, length: int) -> Tensor:
    """Block ids (b, length) of a prompt's (b, s) and the text tokens after it, each a new block."""
    new = torch.arange(1, max(length - block_ids.shape[1], 0) + 1, device=block_ids.device)
    return torch.cat([block_ids, block_ids.amax(1, keepdim=True) + new], 1)[:, :length]


class RopeMMForConditionalGeneration(  # pyright: ignore[reportIncompatibleMethodOverride]
    ImageGenerationMixin, RopeMMPreTrainedModel, GenerationMixin
):
    """Logits and patches from the stream; noise in the place of patches comes out as an image in one pass."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.tokens.weight"}

    def __init__(self, config: RopeMMConfig):
        super().__init__(config)
        self.model = RopeMMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.patch_head = PatchHead(config.hidden_size, config.patch_width, config.bounded_patches)
        # an image token is no text: it takes a patch
        self.generation_config.suppress_tokens = [config.image_token_id]
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @takes_any_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        patches: Tensor | None = None,
        block_ids: Tensor | None = None,
        rope_deltas: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RopeMMOutput:
        """Logits and patches of a batch.

        Args:
            input_ids: (b, s); see `RopeMMModel.forward` for this and the next ones.
            attention_mask: (b, past + s).
            position_ids: (1 + a, b, s) or (b, s).
            cache: a cache to read and to fill.
            inputs_embeds: (b, s, c).
            patches: (b, n, p) or (n, p); they may be noise.
            block_ids: (b, s).
            rope_deltas: (b,).
            labels: (b, s), -100 where none; for the loss of the next text token.
            return_logits: whether to make logits, which a large vocabulary makes larger than all else.
            logits_to_keep: number of last tokens whose logits are wanted, or their indices; 0 is all.
            kwargs: other arguments of `RopeMMModel.forward` and of transformers' loss.

        Raises:
            ValueError: as `RopeMMModel.forward`.
        """
        self.check_arguments(kwargs, GENERATION_ARGUMENTS)
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            patches,
            block_ids,
            rope_deltas,
            **kwargs,
        )
        x = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept]) if return_logits else None
        loss = None
        if labels is not None and logits is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        made = None
        if patches is not None:
            image_mask = self.model.image_mask(input_ids, inputs_embeds)
            made = self.patch_head(x, image_mask, patches.flatten(0, -2).shape[0])
        return RopeMMOutput(loss, logits, cache_of(out), out.hidden_states, out.attentions, made, x)


class RopeMMCritic(RopeMMPreTrainedModel):
    """One score (b,) for a caption and its patches."""

    def __init__(self, config: RopeMMConfig):
        super().__init__(config)
        self.model = RopeMMModel(config)
        self.score_head = ScoreHead(config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor, patches: Tensor, **inputs: Any) -> Tensor:
        """Scores (b,) of ids (b, s) and patches (b, n, p) or (n, p); see `RopeMMModel.forward` for others."""
        x = self.model(input_ids, patches=patches, **inputs).last_hidden_state
        return self.score_head(x, input_ids == self.config.image_token_id)


def names_of(function: Any) -> set[str]:
    """The names of a function's arguments, without `self` and `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}


# what transformers gives to a forward for its decorators, its losses and the attention backends
PASSED_ON = {*TransformersKwargs.__annotations__, "cache_position", "ignore_index", "shift_labels"}
MODEL_ARGUMENTS = frozenset(PASSED_ON | names_of(RopeMMModel.forward))
GENERATION_ARGUMENTS = MODEL_ARGUMENTS | names_of(RopeMMForConditionalGeneration.forward)
BACKEND_INPUTS = {
    "module",
    "query",
    "key",
    "value",
    "attention_mask",
    "scaling",
}  # which the model gives itself
