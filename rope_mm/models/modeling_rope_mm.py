"""The small multimodal transformer: words, images and videos in, words and patches out, or a score."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from rope_mm.attention import visible
from rope_mm.blocks import Block
from rope_mm.embed import Embed
from rope_mm.heads import PatchHead, ScoreHead
from rope_mm.models.configuration_rope_mm import RopeMMConfig
from rope_mm.rotary import Rotary


@dataclass
class RopeMMOutput(ModelOutput):
    """`loss` of the words, their `logits` (b, s, vocab), the `patches` (n, p) read at the image places."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    patches: Tensor | None = None
    last_hidden_state: Tensor | None = None


class RopeMMPreTrainedModel(PreTrainedModel):
    """What all heads share: config, initialisation."""

    config_class = RopeMMConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, Rotary):
            module.reset_parameters()
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class RopeMMModel(RopeMMPreTrainedModel):
    """The transformer without a head."""

    def __init__(self, config: RopeMMConfig):
        super().__init__(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed = Embed(config.vocab_size, width, config.patch_width)
        heads = config.num_key_value_heads if config.scheme.per_head else None
        self.rotary = Rotary(config.head_dim, config.scheme, heads=heads)
        sizes = (
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.blocks = nn.ModuleList(Block(width, *sizes, eps) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(width, eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed.words

    def set_input_embeddings(self, value: nn.Module):
        self.embed.words = value  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self, input_ids: Tensor, positions: Tensor, rank: Tensor, patches: Tensor | None = None
    ) -> Tensor:
        """The stream (b, s, c) of a sequence.

        Args:
            input_ids: (b, s), `image_token_id` where a patch stands.
            positions: (b, s, a), from `place`.
            rank: (b, s), from `ranks`: a token sees those of its own and of lower rank.
            patches: (b, n, p) or (n, p), one for every image token, in order.
        """
        x = self.embed(input_ids, patches, input_ids == self.config.image_token_id)  # (b, s, c)
        turn = self.rotary.turn(positions, x.dtype)  # once; every layer uses the same
        mask = visible(rank)  # (b, 1, s, s)
        for block in self.blocks:
            x = block(x, turn, mask)
        return self.norm(x)


class RopeMMForConditionalGeneration(RopeMMPreTrainedModel):
    """Words and patches from the stream; noise in the place of patches comes out as an image, in one pass."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.words.weight"}

    def __init__(self, config: RopeMMConfig):
        super().__init__(config)
        self.model = RopeMMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.patch_head = PatchHead(config.hidden_size, config.patch_width, config.bounded_patches)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        rank: Tensor,
        patches: Tensor | None = None,
        labels: Tensor | None = None,
        words: bool = True,
    ) -> RopeMMOutput:
        """Logits and patches; with labels (b, s), -100 where none, also the next-word loss.

        See `RopeMMModel.forward` for the other arguments; `patches` may be noise. Without `words` no logits
        are made: with a large vocabulary they are larger than all else.
        """
        x = self.model(input_ids, positions, rank, patches)
        logits, loss = self.lm_head(x) if words else None, None
        if labels is not None and logits is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return RopeMMOutput(loss, logits, self.patch_head(x, input_ids == self.config.image_token_id), x)


class RopeMMCritic(RopeMMPreTrainedModel):
    """One score (b,) for a caption and its patches."""

    def __init__(self, config: RopeMMConfig):
        super().__init__(config)
        self.model = RopeMMModel(config)
        self.score_head = ScoreHead(config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor, positions: Tensor, rank: Tensor, patches: Tensor) -> Tensor:
        """Scores (b,); see `RopeMMModel.forward` for the arguments."""
        x = self.model(input_ids, positions, rank, patches)
        return self.score_head(x, input_ids == self.config.image_token_id)
