"""Plain torch functions of the signatures of flash-attn 2 and 3, which stand in for the packages."""

import sys
from types import ModuleType, SimpleNamespace

import torch
from transformers import modeling_flash_attention_utils


def attend(q, k, v, scale, causal):
    """Heads (m, h, d) of queries (m, h, d) at keys (n, g, d); a causal mask ends at the last of both."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->hmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        m, n = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(m, n).tril(n - m) == 0, -torch.inf)
    return torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v)


class FlashAttn:
    """The functions of flash-attn 2 and 3, and how often each was called."""

    def __init__(self):
        self.calls = {"dense": 0, "varlen": 0}

    def dense(self, q, k, v, scale, causal):
        self.calls["dense"] += 1
        return torch.stack([attend(*row, scale, causal) for row in zip(q, k, v, strict=True)])

    def varlen(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal):
        self.calls["varlen"] += 1
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        sizes = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max(sizes[0]), max(sizes[1])) == (max_seqlen_q, max_seqlen_k)
        parts = zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]), strict=True)
        return torch.cat([attend(*part, scale, causal) for part in parts])

    def version_2(self):
        module = ModuleType("flash_attn")

        def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                            softcap=0.0, alibi_slopes=None, deterministic=False,
                            return_attn_probs=False):  # fmt: skip
            return self.dense(q, k, v, softmax_scale, causal)

        def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                   dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                                   softcap=0.0, alibi_slopes=None, deterministic=False,
                                   return_attn_probs=False, block_table=None):  # fmt: skip
            ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
            return self.varlen(q, k, v, *ends, softmax_scale, causal)

        module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
        module.flash_attn_with_kvcache = None
        padding = ModuleType("flash_attn.bert_padding")
        padding.pad_input = modeling_flash_attention_utils._pad_input
        padding.unpad_input = modeling_flash_attention_utils._unpad_input
        return {"flash_attn": module, "flash_attn.bert_padding": padding}

    def version_3(self):
        module = ModuleType("flash_attn_interface")

        def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1),
                            softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
                            sm_margin=0):  # fmt: skip
            return self.dense(q, k, v, softmax_scale, causal)

        def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                   seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None,
                                   window_size=(-1, -1), softcap=0.0, num_splits=1, pack_gqa=None,
                                   deterministic=False, sm_margin=0):  # fmt: skip
            ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
            return self.varlen(q, k, v, *ends, softmax_scale, causal)

        module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
        module.flash_attn_with_kvcache = None
        return {"flash_attn_interface": module}


def install(monkeypatch, number):
    """Let transformers find them: how to switch a model to flash attention, and the calls that were made."""
    package = FlashAttn()
    for name, module in (package.version_2() if number == 2 else package.version_3()).items():
        monkeypatch.setitem(sys.modules, name, module)
    for version in (2, 3, 4):
        name = f"is_flash_attn_{version}_available"
        if hasattr(modeling_flash_attention_utils, name):
            monkeypatch.setattr(modeling_flash_attention_utils, name, lambda here=version == number: here)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)

    def switch(model):
        model.config._attn_implementation_internal = f"flash_attention_{number}"

    return SimpleNamespace(switch=switch, calls=package.calls)
