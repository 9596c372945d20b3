"""Every kernel as its launcher asks for it, compiled for GPUs that need not be here; nothing runs.

    python kernels/bench/aot.py             all variants on sm_90, sm_80 and gfx942, as a table
    python kernels/bench/aot.py --quick     a few, those with a bound among them
    python kernels/bench/aot.py --peers     Liger's and flash-attn's kernels as well

Instructions per pair: what one thread executes, times all threads, over all pairs of q and k, counted in the
machine code: NVIDIA has no branch but exits, which is checked, and AMD only skips masked accesses, so each
is executed once. Exits with 1 where a bound is broken.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from rope_mm_kernels import form, norm_rotate, rotate
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

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


class Code(NamedTuple):
    """Registers, bytes of spills and stack, memory accesses (direction, bits), and all instructions."""

    registers: int
    spills: int
    stack: int
    accesses: Counter
    instructions: int


class Driver:
    """As much of a GPU as the compiler asks about."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        """The GPU to compile for."""
        return self.target

    def get_current_device(self):
        """A number of its own: Triton keeps what it compiled by this number."""
        return hash(self.target)

    def get_current_stream(self, device):
        """None of its streams."""
        return 0


class Launch(NamedTuple):
    """A kernel that was compiled, and how many threads it would run."""

    asm: dict[str, Any]
    threads: int


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[Launch]]:
    """Compile what is launched instead of running it."""
    run, launches = JITFunction.run, []

    def compile_only(self, *args, grid, **kw):
        compiled: Any = run(self, *args, grid=grid, **{**kw, "warmup": True})
        size = grid({**dict(zip(self.arg_names, args, strict=False)), **kw}) if callable(grid) else grid
        launches.append(
            Launch(compiled.asm, math.prod(size) * compiled.metadata.num_warps * target.warp_size)
        )

    driver.set_active(Driver(target))
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(form, "lanes_of_a_warp", lambda x: target.warp_size),
        patch.object(torch.cuda, "device", lambda index: nullcontext()),
    ):
        yield launches


def blocks_of(variant: Variant) -> tuple[int, ...]:
    """Two equal blocks, where the pairing asks for them."""
    return (variant.d // 4,) * 2 if variant.pairing == "block" else ()


def both(variant: Variant, target: GPUTarget, call: Callable) -> dict[str, Launch]:
    """Forward and backward of `call`, which has the arguments of `rotate`."""
    pairing, d, learned, h, g, a, n = variant
    q, k = (torch.zeros(1, TOKENS, heads, d, dtype=torch.bfloat16, requires_grad=True) for heads in (h, g))
    omega = torch.zeros((n, a, d // 2) if n > 1 else (a, d // 2), requires_grad=learned)
    with compiling(target) as launches:
        out = call(q, k, torch.zeros(TOKENS, a), omega, pairing=pairing, blocks=blocks_of(variant))
        torch.autograd.backward(out, [torch.zeros_like(x) for x in out])
    return dict(zip(("forward", "backward with dOmega" if learned else "backward"), launches, strict=True))


def normed(q, k, positions, omega, **how):
    """`norm_rotate` with weights of its own."""
    weights = (torch.zeros(q.shape[3], dtype=q.dtype, requires_grad=True) for _ in range(2))
    return norm_rotate(q, k, positions, omega, *weights, **how)


FAMILIES: dict[str, Callable] = {"rotate": rotate, "norm_rotate": normed}


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


def number(pattern: str, text: str) -> int:
    """The first number that the pattern finds."""
    return int(re.findall(pattern, text)[0])


def read_cuda(asm: dict[str, Any]) -> Code:
    """From the cubin, by the tools in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack, local = (number(rf"{word}:(\d+)", usage) for word in ("REG", "STACK", "LOCAL"))
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    jumps = [(at, int(to, 16)) for at, text in lines for to in re.findall(r"BRA\b.*?0x([0-9a-f]+)", text)]
    # the one jump that leads back is a trap behind the end, to itself
    assert all(to >= at for at, to in jumps), "there is a loop: what is written is not what is executed"
    code = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in lines]
    code = [word for word in code if word != "NOP"]
    accesses = Counter()
    for word in code:
        found = re.match(r"(LD|ST)G\.E(?:\.\w+)*?(?:\.(U8|S8|U16|S16|64|128))?(?:\.CONSTANT)?$", word)
        if found:
            accesses[found[1], int((found[2] or "32").strip("US"))] += 1
    spills = sum(bool(re.match("LDL|STL", word)) for word in code)
    return Code(registers, spills, stack + local, accesses, len(code))


def read_hip(asm: dict[str, Any]) -> Code:
    """From AMD's assembly."""
    text: str = asm["amdgcn"]
    names = "vgpr_count", "private_segment_fixed_size", "vgpr_spill_count"
    registers, stack, spills = (number(rf"\.{name}:\s+(\d+)", text) for name in names)
    text = text[: text.index(".Lfunc_end")]
    code = re.findall(r"^\s+((?:[vs]|ds|global|buffer|flat)_\w+)", text, re.MULTILINE)
    bits = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    accesses = Counter()
    for word in code:
        found = re.match(r"(?:global|buffer|flat)_(load|store)_(?:[us]?)(\w+?)(?:_d16)?(?:_hi)?$", word)
        if found:
            accesses[found[1][:2].upper().replace("LO", "LD"), bits[found[2]]] += 1
    return Code(registers, spills, stack, accesses, len(code))


READERS = {"cuda": read_cuda, "hip": read_hip}
# instructions per pair that the language model's heads may cost, (32, 8, 128) on three axes
BOUNDS = {"rotate forward": 20, "rotate backward with dOmega": 40, "norm_rotate forward": 30}


def broken(name: str, variant: Variant, code: Code, each: float, target: GPUTarget) -> list[str]:
    """What a kernel must not do, and does."""
    bound = BOUNDS.get(name) if variant[:2] == ("half", 128) and variant.n == 1 else None
    # a block of d / 4 pairs of 16 bits begins where its size allows
    wide = variant.d % (32 if variant.pairing == "block" else 16) == 0
    wrong = {
        "spills": code.spills or code.stack,
        "accesses of 16 bits": any(bits <= 16 for _, bits in code.accesses),
        "no stores of 128 bits": wide and not code.accesses["ST", 128],
        f"more than {bound} instructions per pair": target.backend == "cuda" and bound and each > bound,
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
    each, code = work / (TOKENS * (variant.h + variant.g) * variant.d / 2), codes[0]
    shape = f"{variant.h}, {variant.g}, {variant.d}"
    cells = title, name, variant.pairing, shape, variant.n, code.registers, code.spills, code.stack
    print("|", *(f"{cell} |" for cell in (*cells, widths(code), f"{each:.1f}")), flush=True)
    return [f"{cells[:5]}: {what}" for what in broken(name, variant, code, each, target)]


def examine(variants: list[Variant], titles: list[str], peers: bool = False) -> list[str]:
    """Print the table of these variants on these targets; what is wrong."""
    print("| target | kernel | pairing | h, g, d | n | registers | spills | stack | accesses | per pair |")
    print("| --- " * 10 + "|")
    wrong = []
    for title in titles:
        target = GPUTarget(*TARGETS[title])
        for variant in variants:
            for family, call in FAMILIES.items():
                for way, launch in both(variant, target, call).items():
                    wrong += row(f"{family} {way}", variant, [launch], target, title)
        for package, (compiled, pairings) in PEERS.items() if peers and target.backend == "cuda" else ():
            for variant in (Variant(pairing, d) for pairing in pairings for d in WIDTHS):
                if find_spec(package):
                    row(package, variant, compiled(variant, target), target, title)
    return wrong


QUICK = [Variant(learned=True), Variant("interleaved"), Variant(d=72)]
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
