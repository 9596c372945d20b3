"""Every kernel as its launcher asks for it, compiled for GPUs that need not be here; nothing runs.

    python kernels/bench/aot.py             all variants on sm_90, sm_80 and gfx942, as a table
    python kernels/bench/aot.py --quick     a few, those with a bound among them
    python kernels/bench/aot.py --peers     Liger's and flash-attn's kernels as well

Instructions per pair: what one thread executes, times all threads, over all pairs of q and k, counted in the
machine code: NVIDIA has no branch but exits, which is checked, and AMD only skips masked accesses, so each
is executed once. Exits with 1 where a bound is broken.
"""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from machine import READERS, Code, Launch, compiling
from rope_mm_kernels import norm_rotate, norm_rotate_by_table, rotate, rotate_by_table
from triton.backends.compiler import GPUTarget

TARGETS = {"sm_90": ("cuda", 90, 32), "sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}
WIDTHS = (64, 72, 80, 88, 96, 128, 256)
# so many that no program of any variant has a token too few
TOKENS = 256


class Variant(NamedTuple):
    """A call with h heads of q and g of k, d channels of 16 bits, all rotated, a axes, n rows of Omega."""

    pairing: str = "half"
    d: int = 128
    learned: bool = False
    h: int = 32
    g: int = 8
    a: int = 3
    n: int = 1


def blocks_of(variant: Variant) -> tuple[int, ...]:
    """Two equal blocks, where the pairing asks for them."""
    return (variant.d // 4,) * 2 if variant.pairing == "block" else ()


def both(variant: Variant, target: GPUTarget, call: Callable) -> dict[str, list[Launch]]:
    """Forward, one launch, and backward of `call`, which has the arguments of `rotate`."""
    pairing, d, learned, h, g, a, n = variant
    q, k = (torch.zeros(1, TOKENS, heads, d, dtype=torch.bfloat16, requires_grad=True) for heads in (h, g))
    omega = torch.zeros((n, a, d // 2) if n > 1 else (a, d // 2), requires_grad=learned)
    with compiling(target) as launches:
        out = call(q, k, torch.zeros(TOKENS, a), omega, pairing=pairing, blocks=blocks_of(variant))
        torch.autograd.backward(out, [torch.zeros_like(x) for x in out])
    backward = "backward with dOmega" if learned else "backward"
    return {"forward": launches[:1], backward: launches[1:]}


def normed(q, k, positions, omega, **how):
    """`norm_rotate` with weights of its own."""
    weights = (torch.zeros(q.shape[3], dtype=q.dtype, requires_grad=True) for _ in range(2))
    return norm_rotate(q, k, positions, omega, *weights, **how)


def tabled(q, k, positions, omega, **how):
    """`rotate_by_table` with tables of a batch."""
    return rotate_by_table(q, k, *torch.zeros(2, 1, TOKENS, 2 * omega.shape[-1], dtype=q.dtype), **how)


def normed_tabled(q, k, positions, omega, **how):
    """`norm_rotate_by_table` with weights of its own."""
    tables = torch.zeros(2, 1, TOKENS, 2 * omega.shape[-1], dtype=q.dtype)
    weights = (torch.zeros(q.shape[3], dtype=q.dtype, requires_grad=True) for _ in range(2))
    return norm_rotate_by_table(q, k, *tables, *weights, **how)


FAMILIES: dict[str, Callable] = {"rotate": rotate, "norm_rotate": normed}
# these have no Omega to learn, nor rows of it
TABLED: dict[str, Callable] = {"rotate_by_table": tabled, "norm_rotate_by_table": normed_tabled}


def families(variant: Variant) -> dict[str, Callable]:
    """Those that such a call can ask for."""
    return FAMILIES | ({} if variant.learned or variant.n > 1 else TABLED)


def liger(variant: Variant, target: GPUTarget) -> list[Launch]:
    """Liger's kernel, with tables in float32."""
    from liger_kernel.ops.rope import rope_forward  # pyright: ignore[reportMissingImports]

    q, k = (torch.zeros(1, TOKENS, heads, variant.d).bfloat16() for heads in (variant.h, variant.g))
    with compiling(target) as launches:
        rope_forward(q.transpose(1, 2), k.transpose(1, 2), *torch.zeros(2, 1, TOKENS, variant.d))
    return launches


def flash(variant: Variant, target: GPUTarget) -> list[Launch]:
    """Flash-attn's kernel, launched for q and again for k, with tables in bfloat16, as it asks."""
    from flash_attn.ops.triton.rotary import apply_rotary  # pyright: ignore[reportMissingImports]

    cos, sin = torch.zeros(2, TOKENS, variant.d // 2).bfloat16()
    with compiling(target) as launches:
        for heads in (variant.h, variant.g):
            x = torch.zeros(1, TOKENS, heads, variant.d).bfloat16()
            apply_rotary(x, cos, sin, interleaved=variant.pairing == "interleaved")
    return launches


# package -> its kernels, and the pairings that they know
PEERS = {"liger_kernel": (liger, ("half",)), "flash_attn": (flash, ("half", "interleaved"))}


# instructions per pair that the language model's heads may cost, (32, 8, 128) on three axes, halves paired:
# what triton 3.7.1 or 3.9.0 makes, the larger, rounded up
BOUNDS = {
    "cuda": {
        "rotate forward": 20,
        "rotate backward": 20.2,
        "rotate backward with dOmega": 32,
        "norm_rotate forward": 29,
        "norm_rotate backward": 59,
        "norm_rotate backward with dOmega": 71,
        "rotate_by_table forward": 13,
        "rotate_by_table backward": 13.2,
        "norm_rotate_by_table forward": 21.5,
        "norm_rotate_by_table backward": 45,
    },
    "hip": {
        "rotate forward": 28,
        "rotate backward": 28,
        "rotate backward with dOmega": 40.5,
        "norm_rotate forward": 35.1,
        "norm_rotate backward": 65.5,
        "norm_rotate backward with dOmega": 80.5,
        "rotate_by_table forward": 23,
        "rotate_by_table backward": 23,
        "norm_rotate_by_table forward": 31,
        "norm_rotate_by_table backward": 54.5,
    },
}
REGISTERS = {"cuda": 192, "hip": 232}  # of a thread, for the same heads


# of a gradient to Omega, where heads have 72 to 96 channels
NARROW = {"cuda": 42, "hip": 56}


def broken(name: str, variant: Variant, code: Code, each: float, target: GPUTarget) -> list[str]:
    """What a kernel must not do, and does."""
    bounded = variant[:2] == ("half", 128) and variant.n == 1
    bound, most = (BOUNDS[target.backend].get(name), REGISTERS[target.backend]) if bounded else (None, None)
    if name == "rotate backward with dOmega" and variant.pairing == "half" and 72 <= variant.d <= 96:
        bound = NARROW[target.backend]
    # a block of d / 4 pairs of 16 bits begins where its size allows
    wide = variant.d % (32 if variant.pairing == "block" else 16) == 0
    wrong = {
        "spills": code.spills or code.stack,
        "accesses of 16 bits": any(bits <= 16 for _, bits in code.accesses),
        "no stores of 128 bits": wide and not code.accesses["ST", 128],
        f"more than {bound} instructions per pair": bound and each > bound,
        f"more than {most} registers": most and code.registers > most,
    }
    return [what for what, is_so in wrong.items() if is_so]


def widths(code: Code) -> str:
    """Loads and stores as bits x number."""
    found = sorted(code.accesses.items(), reverse=True)
    ways = {"load": "LD", "store": "ST"}.items()
    return ", ".join(
        " ".join([name, *(f"{bits}x{count}" for (way, bits), count in found if way == short)])
        for name, short in ways
    )


def row(name: str, variant: Variant, launches: list[Launch], target: GPUTarget, title: str) -> list[str]:
    """Print what is measured of a kernel, launched once or more; what is wrong with it."""
    codes = [READERS[target.backend](launch.asm) for launch in launches]
    work = sum(code.instructions * launch.threads for code, launch in zip(codes, launches, strict=True))
    each = work / (TOKENS * (variant.h + variant.g) * variant.d / 2)
    shape = f"{variant.h}, {variant.g}, {variant.d}"
    most = (max(column) for column in list(zip(*codes, strict=True))[:3])
    cells = title, name, variant.pairing, shape, variant.n, *most
    print("|", *(f"{cell} |" for cell in (*cells, widths(codes[0]), f"{each:.1f}")), flush=True)
    wrong = (what for code in codes for what in broken(name, variant, code, each, target))
    return [f"{cells[:5]}: {what}" for what in wrong]


def examine(variants: list[Variant], titles: list[str], peers: bool = False) -> list[str]:
    """Print the table of these variants on these targets; what is wrong."""
    print("| target | kernel | pairing | h, g, d | n | registers | spills | stack | accesses | per pair |")
    print("| --- " * 10 + "|")
    wrong = []
    for title in titles:
        target = GPUTarget(*TARGETS[title])
        for variant in variants:
            for family, call in families(variant).items():
                for way, launched in both(variant, target, call).items():
                    wrong += row(f"{family} {way}", variant, launched, target, title)
        for package, (compiled, pairings) in PEERS.items() if peers and target.backend == "cuda" else ():
            for variant in (Variant(pairing, d) for pairing in pairings for d in WIDTHS):
                if find_spec(package):
                    row(package, variant, compiled(variant, target), target, title)
    return wrong


QUICK = [Variant(learned=True), Variant(), Variant("interleaved", learned=True)]
QUICK += [Variant(d=72), Variant(d=72, learned=True)]
ALL = [
    Variant(pairing, d, learned)
    for pairing in ("half", "interleaved", "block")
    for d in WIDTHS
    for learned in (False, True)
] + [Variant(n=8, learned=True), Variant(n=32, g=32, learned=True)]


def main() -> int:
    """Read the flags and print the table."""
    text = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**text)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="few variants, those with a bound among them")
    parser.add_argument("--peers", action="store_true", help="kernels of other packages as well")
    flags = parser.parse_args()
    for package in PEERS if flags.peers else ():
        if not find_spec(package):
            print(f"{package} is not installed")
    wrong = examine(QUICK if flags.quick else ALL, flags.targets, flags.peers)
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
