"""A tiny random Qwen2.5-VL with RoPE-TV learns to name digits, with transformers' Trainer and peft's LoRA.

    python examples/qwen_vl_rope_tv.py    # 15 seconds on one core, nothing is downloaded

The scheme places text and images inside the model's own forward; the training code stays as it is.
"""

import tempfile
from typing import Any

import torch
from numpy import asarray
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Trainer, TrainingArguments

from rope_mm.data import captioned_digits
from rope_mm.hf import explain, set_rope

IMAGE = 130  # the token of an image patch; characters are the numbers below 128
TOKENS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": 131, "vision_start_token_id": 132}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": 134, "rope_parameters": ROPE}
VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 2, "out_hidden_size": 64}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: digits of 8 x 8 pixels, 4 x 4 patches that become 4 tokens, each followed by its caption."""
    captions = [torch.tensor([IMAGE] * 4 + [1, *row["caption"].encode(), 2]) for row in rows]
    ids = pad_sequence(captions, batch_first=True)
    grey = torch.stack([torch.tensor(asarray(row["image"])) for row in rows]) / 255
    blocks = grey.view(-1, 2, 2, 2, 2, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)  # 2 x 2 of 2 x 2 patches
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "labels": ids.masked_fill((ids == 0) | (ids == IMAGE), -100),
        "pixel_values": blocks.reshape(-1, 1, 4).expand(-1, 6, -1).flatten(1),  # three colours, two frames
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(rows)),
    }


config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, **TOKENS)
qwen = Qwen2_5_VLForConditionalGeneration(config)
set_rope(qwen, "rope-tv")
explain(qwen)
model = get_peft_model(qwen, LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
run: dict[str, Any] = {"max_steps": 30, "learning_rate": 1e-2, "per_device_train_batch_size": 16}
run |= {"logging_steps": 5, "report_to": [], "save_strategy": "no", "remove_unused_columns": False}
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, **run, disable_tqdm=True, dataloader_pin_memory=False)
    trainer = Trainer(model, arguments, collate, captioned_digits()["train"])
    trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < 0.6 * losses[0], losses
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
