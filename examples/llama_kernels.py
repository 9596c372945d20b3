"""Llama with our rotation in the place of its own: a fused kernel on a GPU, plain torch elsewhere.

    python examples/llama_kernels.py    # seconds on one core, nothing is downloaded

`use_kernels` compares a small forward before and after, and refuses if they differ. It works for training and
for inference, and changes no other model.
"""

import copy
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rope_mm.hf import explain, use_kernels

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def step(model: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The loss, and the gradient of the first layer's query projection."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    grad = model.model.layers[0].self_attn.q_proj.weight.grad
    assert grad is not None
    return loss.item(), grad.clone()


def main() -> None:
    """Compare one training step of the same weights with and without our op."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=99, num_key_value_heads=2, **SIZES))
        ids = torch.randint(99, (2, 64))
    plain = copy.deepcopy(llama)

    explain(llama)
    handle = use_kernels(llama)
    explain(llama)

    (loss, grad), (own_loss, own_grad) = step(llama, ids), step(plain, ids)
    print(f"loss {loss:.6f}, with Llama's own function {own_loss:.6f}")
    print(f"gradients differ by {(grad - own_grad).abs().max():.1e}; the largest is {grad.abs().max():.1e}")
    assert torch.allclose(grad, own_grad, atol=1e-6)
    handle.undo()
    assert torch.equal(step(llama, ids)[1], own_grad)


if __name__ == "__main__":
    main()
