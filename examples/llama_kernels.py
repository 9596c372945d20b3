"""Llama with our rotation in place of its own function: a fused kernel on a GPU, the definition elsewhere.

    python examples/llama_kernels.py    # seconds on one core, nothing is downloaded

`use_kernels` runs a small forward before and after, and refuses where they differ; it serves training as well
as inference, and leaves every other model alone.
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
    """The loss, and the gradient of the first layer's queries."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    grad = model.model.layers[0].self_attn.q_proj.weight.grad
    assert grad is not None
    return loss.item(), grad.clone()


def main() -> None:
    """One training step of the same weights with and without our op."""
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
    print(f"gradients differ by {(grad - own_grad).abs().max():.1e}, at most {grad.abs().max():.1e} large")
    assert torch.allclose(grad, own_grad, atol=1e-6)
    handle.undo()
    assert torch.equal(step(llama, ids)[1], own_grad)


if __name__ == "__main__":
    main()
