"""RopeMM under transformers' mixins; `run.py` brings them, and pytest by itself does not look here."""

import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_processing_common import ProcessorTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

from rope_mm import Image
from rope_mm.models import (
    IMAGE_TOKEN,
    RopeMMConfig,
    RopeMMForConditionalGeneration,
    RopeMMModel,
    RopeMMProcessor,
    build_batch,
    load_tokenizer,
)

# by these the mixins know what labels and inputs a class takes
modeling_auto.MODEL_MAPPING_NAMES["rope_mm"] = "RopeMMModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["rope_mm"] = "RopeMMForConditionalGeneration"


class RopeMMTester:
    """A model of toy size, and a caption before an image for it."""

    causal_lm_class = RopeMMForConditionalGeneration
    base_model_class = RopeMMModel

    def __init__(self, parent):
        self.parent = parent
        self.batch_size, self.seq_length, self.is_training = 7, 14, True
        self.num_hidden_layers, self.hidden_size, self.num_attention_heads = 2, 32, 4
        self.vocab_size = 260

    def get_config(self):
        return RopeMMConfig(
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            initializer_range=0.02,
            image_token_id=20,  # no token of the mixins, and below their smaller vocabularies
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        sequences = [["a pic", Image(1, 5), "ture"]] * self.batch_size
        inputs = build_batch(sequences, load_tokenizer(), config.scheme).inputs()
        tokens = ids_tensor([self.batch_size, self.seq_length], 200) + 21
        inputs["input_ids"] = tokens.index_fill(1, torch.arange(5, 10), config.image_token_id)
        return config, inputs | {"patches": torch.randn(self.batch_size, 5, config.patch_width)}

    def prepare_config_and_inputs_for_model_class(self, model_class):
        """For a test that takes one row of what has rows in front: position_ids (1 + a, b, s) have not."""
        config, inputs = self.prepare_config_and_inputs_for_common()
        return config, {name: x for name, x in inputs.items() if name != "position_ids"}


# of GenerationTesterMixin the archive has nothing: tests/models/test_generation.py stands for it
class RopeMMModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (RopeMMModel, RopeMMForConditionalGeneration)
    model_tester = None
    additional_model_inputs = ("patches", "block_ids")
    test_all_params_have_gradient = False  # the loss of text does not reach the patch head

    def setUp(self):
        self.model_tester = RopeMMTester(self)
        self.config_tester = ConfigTester(self, config_class=RopeMMConfig, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()


class RopeMMProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = RopeMMProcessor
    images_input_name = videos_input_name = "patches"

    @classmethod
    def _setup_tokenizer(cls):
        words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
        words.pre_tokenizer = Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        return tokenizer

    @unittest.skip(
        "parts of a document are tokenized one by one, so there are no offsets of the assistant's text"
    )
    def test_apply_chat_template_assistant_mask(self):
        pass

    @classmethod
    def prepare_processor_dict(cls):
        return {"num_channels": 3}
