"""The kernels as ops of PyTorch, for graphs: torch.compile, torch.export and who looks at what is called.

Here a function takes tensors and numbers, and last a KernelSpec; its op takes the fields one by one.
An op costs some microseconds more than a function, so calls without a graph do not go through here.
"""

from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from rope_mm_kernels.checks import NAMESPACE
from rope_mm_kernels.plan import KernelSpec
from rope_mm_kernels.trig import cos_sin

INTERPRETED = not isinstance(cos_sin, JITFunction)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
# torch has a `mode` of its own where it makes functions of ops that write, so ours is called otherwise
FIELDS = "SymInt n, SymInt a, SymInt r, SymInt[] blocks, SymInt front, str angles, float factor, bool inverse"
COUNT = len(KernelSpec._fields)


def fold_spec(args: tuple) -> tuple:
    """The arguments of an op, the fields of the spec in one; blocks come as a list."""
    n, a, r, blocks, *rest = args[-COUNT:]
    return *args[:-COUNT], KernelSpec(n, a, r, tuple(blocks), *rest)


def register(name: str, inputs: str, outputs: str, kernel: Callable, definition: Callable, fake: Callable):
    """The op `name`(inputs, FIELDS) -> outputs, `kernel` on GPUs and `definition` on a CPU, as a function.

    `fake` makes tensors like its results.
    """
    _library.define(f"{name}({inputs}, {FIELDS}) -> {outputs}")
    for backend in ("CUDA", "XPU"):  # AMD's is CUDA, too
        _library.impl(name, lambda *args: kernel(*fold_spec(args)), backend)
    runs = kernel if INTERPRETED else definition
    _library.impl(name, lambda *args: runs(*fold_spec(args)), "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: fake(*fold_spec(args)), lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name)
    return lambda *args: op(*args[:-1], *args[-1])


def differentiate(name: str, save: Callable, backward: Callable) -> None:
    """Give an op its gradient: `save` and `backward` of a torch.autograd.Function with its arguments."""

    def setup_context(ctx: Any, inputs, output):
        save(ctx, fold_spec(inputs), output)

    def gradients(ctx: Any, *grads):
        return *backward(ctx, *grads), *[None] * (COUNT - 1)

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", gradients, setup_context=setup_context, lib=_library
    )
