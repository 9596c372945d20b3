"""The small multimodal transformer as transformers' classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from rope_mm.models.canvas import ImageBatcher as ImageBatcher
from rope_mm.models.configuration_rope_mm import RopeMMConfig as RopeMMConfig
from rope_mm.models.configuration_rope_mm import read_config as read_config
from rope_mm.models.modeling_rope_mm import RopeMMCritic as RopeMMCritic
from rope_mm.models.modeling_rope_mm import RopeMMForConditionalGeneration as RopeMMForConditionalGeneration
from rope_mm.models.modeling_rope_mm import RopeMMModel as RopeMMModel
from rope_mm.models.processing_rope_mm import RopeMMProcessor as RopeMMProcessor
from rope_mm.models.sequences import SequenceBatch as SequenceBatch
from rope_mm.models.sequences import build_batch as build_batch
from rope_mm.models.tokenizers import IMAGE_TOKEN as IMAGE_TOKEN
from rope_mm.models.tokenizers import load_tokenizer as load_tokenizer

AutoConfig.register("rope_mm", RopeMMConfig)
AutoModel.register(RopeMMConfig, RopeMMModel)
AutoModelForCausalLM.register(RopeMMConfig, RopeMMForConditionalGeneration)
AutoModelForImageTextToText.register(RopeMMConfig, RopeMMForConditionalGeneration)
AutoProcessor.register(RopeMMConfig, RopeMMProcessor)
