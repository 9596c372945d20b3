"""The small multimodal transformer: words, images and videos in, words and patches out, or a score."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack  # pyright: ignore[reportAttributeAccessIssue]
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from rope_mm.models.generation import ImageGenerationMixin
from rope_mm.models.position_ids import count_tokens, document_ids, make_mask, unpack_position_ids
from rope_mm.models.rolling import QueryAngles, UnrotatedKeyCache
from rope_mm.nn.attention import Attention
from rope_mm.nn.blocks import Block
from rope_mm.nn.eager import eager_attention
from rope_mm.nn.heads import PatchHead, ScoreHead
from rope_mm.nn.patches import PatchEmbedding, TokenEmbedding
from rope_mm.rotary.module import Rotary

from .configuration_rope_mm import RopeMMConfig  # beside this file also where a saved model brings its code


@dataclass
class RopeMMOutput(ModelOutput):
    """`loss` of the words, their `logits` (b, s, vocab), the `patches` (n, p) read at the image places."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
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
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, past_key_values: Cache | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        chosen = self.config._attn_implementation or "sdpa"
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention)
        return backend(self, q, k, v, mask, scaling=self.head_dim**-0.5, **kwargs)


class RopeMMBlock(GradientCheckpointingLayer, Block):
    """A block whose insides can be computed anew in the backward."""


class RopeMMPreTrainedModel(PreTrainedModel):
    """What all heads share: config, initialisation, what transformers may do with it."""

    config_class = RopeMMConfig
    base_model_prefix = "model"
    _no_split_modules = ["RopeMMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
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


class RopeMMModel(RopeMMPreTrainedModel):
    """The transformer without a head."""

    def __init__(self, config: RopeMMConfig):
        super().__init__(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed = TokenEmbedding(config.vocab_size, width, config.patch_width)
        heads = config.num_key_value_heads if config.scheme.per_head else None
        self.rotary = Rotary(config.head_dim, config.scheme, heads=heads)
        self.blocks = nn.ModuleList(
            RopeMMBlock(width, config.intermediate_size, RopeMMAttention(config, layer), eps)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(width, eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed.words

    def set_input_embeddings(self, value: nn.Module):
        self.embed.words = value  # pyright: ignore[reportAttributeAccessIssue]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        patches: Tensor | None = None,
        rank: Tensor | None = None,
        rope_deltas: Tensor | None = None,
        document: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """The stream (b, s, c) of a sequence; `arrange` and `RopeMMProcessor` make all of these.

        Args:
            input_ids: (b, s), `image_token_id` where a patch stands.
            attention_mask: (b, past + s), 0 at padding.
            position_ids: (1 + a, b, s), row 0 the numbers of the tokens, then their positions on each axis;
                or (b, s), numbers of words. A document begins where the numbers do not go on.
            past_key_values: a cache to read and to fill.
            inputs_embeds: (b, s, c) in the place of input_ids.
            patches: (b, n, p) or (n, p), one for every image token, in order.
            rank: (b, s), from `ranks`: a token sees those of its own and of lower rank, see `sees`; None for
                words.
            rope_deltas: (b,), by how much words stand beyond their tokens' numbers.
            document: (b, s), numbers of packed documents; else position_ids or cu_seq_lens_q tell.
            use_cache: whether to return a cache; a forward by itself makes none.
            kwargs: for the backend, such as `cu_seq_lens_q`, where packed documents end.

        Raises:
            ValueError: patches that do not fit their places, packed documents for a cache, an Omega that
                depends on the length for a cache.
        """
        places = self.places(input_ids, inputs_embeds)
        x = self.embed.words(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.embed(x, patches, places)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = count_tokens(x, attention_mask, past)
        count, positions = unpack_position_ids(position_ids, self.config.scheme, rope_deltas)
        if document is None:
            document = document_ids(count, attention_mask, kwargs.get("cu_seq_lens_q"))
        if past_key_values is not None:
            self.check_cache(document)
        mask = make_mask(self.config, x, attention_mask, past_key_values, rank, document)
        with record_function("rotary angles"):  # by which name a profile finds it
            angles = self.rotary.angles(positions, x.dtype)  # once; every layer uses the same
        if isinstance(past_key_values, UnrotatedKeyCache):
            angles = QueryAngles(**vars(angles))
        for block in self.blocks:
            x = block(x, angles, mask, past_key_values=past_key_values, position_ids=count, **kwargs)
        return BaseModelOutputWithPast(self.norm(x), past_key_values)

    def places(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Where (b, s) image tokens stand, among ids or among their vectors."""
        if input_ids is not None and inputs_embeds is None:
            return input_ids == self.config.image_token_id
        if inputs_embeds is not None and input_ids is None:
            return (inputs_embeds == self.embed.words.weight[self.config.image_token_id]).all(-1)
        raise ValueError("give either input_ids or inputs_embeds")

    def check_cache(self, document: Tensor | None) -> None:
        """Refuse what a cache cannot serve."""
        if document is not None:
            raise ValueError(
                "packed documents cannot be cached: a later token would see them all; pass use_cache=False"
            )
        if self.rotary.scheme.needs_length:
            raise ValueError(
                "this scheme's Omega depends on the length, so cached keys would be turned otherwise than "
                "new ones; pass use_cache=False"
            )


class RopeMMForConditionalGeneration(  # pyright: ignore[reportIncompatibleMethodOverride]
    ImageGenerationMixin, RopeMMPreTrainedModel, GenerationMixin
):
    """Words and patches from the stream; noise in the place of patches comes out as an image, in one pass."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.words.weight"}

    def __init__(self, config: RopeMMConfig):
        super().__init__(config)
        self.model = RopeMMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.patch_head = PatchHead(config.hidden_size, config.patch_width, config.bounded_patches)
        # an image token is no word: it takes a patch
        self.generation_config.suppress_tokens = [config.image_token_id]
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        patches: Tensor | None = None,
        rank: Tensor | None = None,
        rope_deltas: Tensor | None = None,
        labels: Tensor | None = None,
        words: bool = True,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RopeMMOutput:
        """Logits and patches; with labels (b, s), -100 where none, also the next-word loss.

        See `RopeMMModel.forward` for the other arguments; `patches` may be noise. Without `words` no logits
        are made: with a large vocabulary they are larger than all else. `logits_to_keep` are the last ones
        wanted, or their places; 0 is all.
        """
        seen = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            patches,
            rank,
            rope_deltas,
            **kwargs,
        )
        x = seen.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept]) if words else None
        loss = None
        if labels is not None and logits is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        drawn = None if patches is None else self.patch_head(x, self.model.places(input_ids, inputs_embeds))
        rest = seen.past_key_values, seen.hidden_states, seen.attentions
        return RopeMMOutput(loss, logits, *rest, drawn, x)


class RopeMMCritic(RopeMMPreTrainedModel):
    """One score (b,) for a caption and its patches."""

    def __init__(self, config: RopeMMConfig):
        super().__init__(config)
        self.model = RopeMMModel(config)
        self.score_head = ScoreHead(config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor, patches: Tensor, **inputs: Any) -> Tensor:
        """Scores (b,); see `RopeMMModel.forward` for the arguments."""
        x = self.model(input_ids, patches=patches, **inputs).last_hidden_state
        return self.score_head(x, input_ids == self.config.image_token_id)
