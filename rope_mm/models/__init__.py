"""The small multimodal transformer as transformers' classes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rope_mm.checks.extras import extra

with extra("hf"):
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    from rope_mm.models.configuration_rope_mm import RopeMMConfig as RopeMMConfig
    from rope_mm.models.configuration_rope_mm import read_config as read_config
    from rope_mm.models.modeling_rope_mm import RopeMMCritic as RopeMMCritic
    from rope_mm.models.modeling_rope_mm import (
        RopeMMForConditionalGeneration as RopeMMForConditionalGeneration,
    )
    from rope_mm.models.modeling_rope_mm import RopeMMModel as RopeMMModel
    from rope_mm.models.processing_rope_mm import RopeMMProcessor as RopeMMProcessor
    from rope_mm.models.sequences import SequenceBatch as SequenceBatch
    from rope_mm.models.sequences import build_batch as build_batch
    from rope_mm.models.tokenizers import IMAGE_TOKEN as IMAGE_TOKEN
    from rope_mm.models.tokenizers import load_tokenizer as load_tokenizer

if TYPE_CHECKING:
    from rope_mm.models.image_batcher import ImageBatcher as ImageBatcher
    from rope_mm.models.pipeline import GenerationSpec as GenerationSpec
    from rope_mm.models.pipeline import RopeMMPipeline as RopeMMPipeline

NEED_DATA = {  # and with it the package datasets; name -> its module here
    "GenerationSpec": "pipeline",
    "ImageBatcher": "image_batcher",
    "RopeMMPipeline": "pipeline",
}

AutoConfig.register("rope_mm", RopeMMConfig)
AutoModel.register(RopeMMConfig, RopeMMModel)
AutoModelForCausalLM.register(RopeMMConfig, RopeMMForConditionalGeneration)
AutoModelForImageTextToText.register(RopeMMConfig, RopeMMForConditionalGeneration)
AutoProcessor.register(RopeMMConfig, RopeMMProcessor)

__all__ = [
    "IMAGE_TOKEN",
    "GenerationSpec",
    "ImageBatcher",
    "RopeMMConfig",
    "RopeMMCritic",
    "RopeMMForConditionalGeneration",
    "RopeMMModel",
    "RopeMMPipeline",
    "RopeMMProcessor",
    "SequenceBatch",
    "build_batch",
    "load_tokenizer",
    "read_config",
]


def __getattr__(name: str) -> Any:
    if name not in NEED_DATA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rope_mm.models.{NEED_DATA[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *NEED_DATA})
