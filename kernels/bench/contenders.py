"""Who is timed: the kernels here and their peers, as functions of a case that return a call to repeat."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from cases import Case, Shape, ladder, sections
from torch import Tensor

Call = Callable[[], Any]
Turn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward(turn: Callable[[Case], Turn]) -> Callable[[Case], Call]:
    """One way, without a graph."""

    def ready(case: Case) -> Call:
        call = turn(case)

        def once():
            with torch.no_grad():
                return call(case.q, case.k)

        return once

    return ready


def backward(turn: Callable[[Case], Turn]) -> Callable[[Case], Call]:
    """The way back, for heads only."""

    def ready(case: Case) -> Call:
        q, k = (x.detach().requires_grad_() for x in (case.q, case.k))
        out = turn(case)(q, k)
        return lambda: torch.autograd.grad(out, (q, k), case.grads, retain_graph=True)

    return ready


def transposed(apply: Callable, *args: Any) -> Turn:
    """A function of heads (b, h, s, d), given heads (b, s, h, d)."""

    def turn(q, k):
        q, k = apply(q.transpose(1, 2), k.transpose(1, 2), *args)
        return q.transpose(1, 2), k.transpose(1, 2)

    return turn


def rope_mm(case: Case, mode: str = "exact") -> Turn:
    """`rotate`, from positions."""
    from rope_mm_kernels import rotate

    return lambda q, k: rotate(q, k, case.positions, case.omega, mode=mode)


def rope_mm_table(case: Case) -> Turn:
    """`rotate_by_table`."""
    from rope_mm_kernels import rotate_by_table

    return lambda q, k: rotate_by_table(q, k, case.cos, case.sin)


def rope_mm_in_place(case: Case) -> Turn:
    """`rotate_`."""
    from rope_mm_kernels import rotate_

    return lambda q, k: rotate_(q, k, case.positions, case.omega)


def rope_mm_learned(case: Case) -> Call:
    """The way back of `rotate`, with the gradient of Omega."""
    from rope_mm_kernels import rotate

    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.omega)]
    out = rotate(*inputs[:2], case.positions, inputs[2])
    return lambda: torch.autograd.grad(out, inputs, case.grads, retain_graph=True)


def rope_mm_norm(case: Case) -> Turn:
    """`norm_rotate`."""
    from rope_mm_kernels import norm_rotate

    return lambda q, k: norm_rotate(q, k, case.positions, case.omega, case.weight, case.weight)


def rope_mm_norm_table(case: Case) -> Turn:
    """`norm_rotate_by_table`."""
    from rope_mm_kernels import norm_rotate_by_table

    return lambda q, k: norm_rotate_by_table(q, k, case.cos, case.sin, case.weight, case.weight)


def transformers(case: Case) -> Turn:
    """`apply_rotary_pos_emb`."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return transposed(apply_rotary_pos_emb, case.cos, case.sin)


def transformers_norm(case: Case) -> Turn:
    """RMSNorm of torch, then `apply_rotary_pos_emb`."""
    turn, size = transformers(case), case.weight.shape

    def norm(x):
        return torch.nn.functional.rms_norm(x, size, case.weight, 1e-6)

    return lambda q, k: turn(norm(q), norm(k))


def tables(case: Case) -> Call:
    """Cosine and sine as transformers make them (modeling_llama.py, LlamaRotaryEmbedding.forward)."""

    def once():
        angle = case.positions @ case.omega
        both = torch.cat((angle, angle), dim=-1)[None]
        return both.cos().to(case.q.dtype), both.sin().to(case.q.dtype)

    return once


def compiled(turn: Callable[[Case], Turn]) -> Callable[[Case], Turn]:
    """The same through Inductor, for this one shape."""
    return lambda case: torch.compile(turn(case), dynamic=False)


def liger(case: Case) -> Turn:
    """Liger's rope, in place."""
    from liger_kernel.ops.rope import LigerRopeFunction  # pyright: ignore[reportMissingImports]

    return transposed(LigerRopeFunction.apply, case.cos, case.sin)


def liger_multimodal(case: Case) -> Turn:
    """Liger's m-rope on three axes, in place."""
    from liger_kernel.ops import LigerQwen2VLMRopeFunction  # pyright: ignore[reportMissingImports]

    shape = Shape(*case.q.shape[:3], case.k.shape[2], case.q.shape[3], case.positions.shape[-1])
    angle = (case.positions.double().T[:, None, :, None] * ladder(shape).to(case.q.device)).repeat(1, 1, 1, 2)
    cos, sin = (x.expand(-1, shape.b, -1, -1).to(case.q.dtype) for x in (angle.cos(), angle.sin()))
    return transposed(LigerQwen2VLMRopeFunction.apply, cos, sin, sections(shape))


class Flash(torch.autograd.Function):
    """Flash-attn's kernel with the gradient that its module gives it."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        """One of q and k, rotated."""
        from flash_attn.ops.triton.rotary import apply_rotary  # pyright: ignore[reportMissingImports]

        ctx.save_for_backward(cos, sin)
        return apply_rotary(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads):
        """Rotated back."""
        from flash_attn.ops.triton.rotary import apply_rotary  # pyright: ignore[reportMissingImports]

        return apply_rotary(grads[0], *ctx.saved_tensors, conjugate=True), None, None


def half_tables(case: Case) -> list[Tensor]:
    """Cosine and sine (s, r) of every pair."""
    return [x[0].chunk(2, -1)[0].contiguous() for x in (case.cos, case.sin)]


def flash(case: Case) -> Turn:
    """Flash-attn's kernel, for q and again for k."""
    both = half_tables(case)
    return lambda q, k: (Flash.apply(q, *both), Flash.apply(k, *both))


def fla(case: Case) -> Turn:
    """Flash-linear-attention's kernel, for q and again for k."""
    from fla.modules.rotary import rotary_embedding  # pyright: ignore[reportMissingImports]

    both = half_tables(case)
    return lambda q, k: (rotary_embedding(q, *both), rotary_embedding(k, *both))


def torchembed(case: Case) -> Turn:
    """Torchembed's kernel, for q and again for k, of tables (s, d)."""
    from torchembed._triton import fused_rope_forward  # pyright: ignore[reportMissingImports]

    return transposed(fused_rope_forward, case.cos[0], case.sin[0])


class Contender(NamedTuple):
    """The package it needs, its passes, and the numbers of axes it takes (none named: all)."""

    package: str
    passes: dict[str, Callable[[Case], Call]]
    axes: tuple[int, ...] = ()

    @property
    def here(self) -> bool:
        """Whether its package can be imported."""
        return find_spec(self.package) is not None


def both(turn: Callable[[Case], Turn]) -> dict[str, Callable[[Case], Call]]:
    """There and back."""
    return {"forward": forward(turn), "backward": backward(turn)}


def normed(turn: Callable[[Case], Turn]) -> dict[str, Callable[[Case], Call]]:
    """There and back, a norm first."""
    return {"norm forward": forward(turn), "norm backward": backward(turn)}


def in_place(turn: Callable[[Case], Turn]) -> dict[str, Callable[[Case], Call]]:
    """There, over what is there, and back."""
    return {"forward in place": forward(turn), "backward": backward(turn)}


OURS = "rope_mm"
CONTENDERS = {
    OURS: Contender(
        "rope_mm_kernels",
        {
            **both(rope_mm),
            "forward in place": forward(rope_mm_in_place),
            "backward with dOmega": rope_mm_learned,
            **normed(rope_mm_norm),
        },
    ),
    "rope_mm hf": Contender("rope_mm_kernels", both(lambda case: rope_mm(case, "hf"))),
    "rope_mm table": Contender("rope_mm_kernels", {**both(rope_mm_table), **normed(rope_mm_norm_table)}),
    "transformers": Contender(
        "transformers", {**both(transformers), **normed(transformers_norm), "tables": tables}
    ),
    "Inductor": Contender(
        "transformers", {**both(compiled(transformers)), **normed(compiled(transformers_norm))}
    ),
    "Liger": Contender("liger_kernel", in_place(liger)),
    "Liger m-rope": Contender("liger_kernel", in_place(liger_multimodal), (3,)),
    "flash-attn": Contender("flash_attn", both(flash)),
    "fla": Contender("fla", both(fla)),
    "torchembed": Contender("torchembed", both(torchembed)),
}
