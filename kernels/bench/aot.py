"""Every kernel as its launcher asks for it, compiled for GPUs that need not be here; nothing runs.

    python kernels/bench/aot.py             all variants on sm_90, sm_80 and gfx942, as a table
    python kernels/bench/aot.py --quick     a few, those with a bound among them
    python kernels/bench/aot.py --peers     Liger's and flash-attn's kernels as well

Instructions per pair: what one thread executes, over the pairs that this thread rotates, the mean over threads
with pairs and without. It is counted in the machine code: NVIDIA's has no branch but exits, which is checked, and
AMD's only skips masked accesses, so each instruction runs once. Exits with 1 where a bound is broken.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rope_mm_kernels import form, norm_rotate, rotate
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {"sm_90": ("cuda", 90, 32), "sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}
WIDTHS = (64, 72, 80, 88, 96, 128, 256)


class Variant(NamedTuple):
    """A call with h heads of q and g of k, d channels of 16 bits, all rotated, a axes, n rows of Omega."""

    pairing: str = "half"
    d: int = 128
    learned: bool = False
    h: int = 32
    g: int = 8
    a: int = 3
    n: int = 1


class Kernel(NamedTuple):
    """What one launch was compiled to: the code, and how many pairs a thread rotates."""

    name: str
    asm: dict[str, Any]
    pairs: float


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


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list]:
    """Collect (kernel, arguments) of every launch instead of running it."""
    run, lanes, launches = JITFunction.run, form.lanes_of_a_warp, []

    def compile_only(self, *args, **kw):
        launches.append((run(self, *args, **{**kw, "warmup": True}), kw))

    driver.set_active(Driver(target))
    JITFunction.run, form.lanes_of_a_warp = compile_only, lambda x: target.warp_size
    try:
        yield launches
    finally:
        JITFunction.run, form.lanes_of_a_warp = run, lanes


def share(kw: dict[str, Any], target: GPUTarget) -> float:
    """The pairs that a thread of our kernels rotates."""
    lanes = kw["L"] * kw["r"] / (kw["CHUNKS"] * kw["V"])
    return max(kw["HEADS"]) * kw["V"] * lanes / (kw["num_warps"] * target.warp_size)


def blocks_of(variant: Variant) -> tuple[int, ...]:
    """Two equal blocks, where the pairing asks for them."""
    return (variant.d // 4,) * 2 if variant.pairing == "block" else ()


def both(variant: Variant, target: GPUTarget, call: Callable) -> list[Kernel]:
    """Forward and backward of `call`, which has the arguments of `rotate`."""
    pairing, d, learned, h, g, a, n = variant
    q, k = (torch.zeros(2, 8, heads, d, dtype=torch.bfloat16, requires_grad=True) for heads in (h, g))
    omega = torch.zeros((n, a, d // 2) if n > 1 else (a, d // 2), requires_grad=learned)
    given = q, k, torch.zeros(8, a), omega
    with compiling(target) as launches:
        out = call(*given, pairing=pairing, blocks=blocks_of(variant))
        torch.autograd.backward(out, [torch.zeros_like(x) for x in out])
    names = ("forward", "backward with dOmega" if learned else "backward")
    return [
        Kernel(name, compiled.asm, share(kw, target))
        for name, (compiled, kw) in zip(names, launches, strict=True)
    ]


def normed(q, k, positions, omega, **how):
    """`norm_rotate` with weights of its own."""
    weights = (torch.zeros(q.shape[3], dtype=q.dtype, requires_grad=True) for _ in range(2))
    return norm_rotate(q, k, positions, omega, *weights, **how)


FAMILIES: dict[str, Callable] = {"rotate": rotate, "norm_rotate": normed}


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
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL")
    )
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
    registers, stack, spills = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names)
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


def broken(family: str, variant: Variant, kernel: Kernel, code: Code, target: GPUTarget) -> list[str]:
    """What a kernel must not do, and does."""
    stores = [bits for direction, bits in code.accesses if direction == "ST"]
    wrong = {
        "spills": code.spills,
        "local memory": code.stack,
        "accesses of 16 bits": any(bits <= 16 for _, bits in code.accesses),
        "no stores of 128 bits": variant.d % 16 == 0 and 128 not in stores,
        "more than 255 registers": code.registers > 255,
    }
    bound = BOUNDS.get(f"{family} {kernel.name}")
    measured = code.instructions / kernel.pairs
    if variant[:2] == ("half", 128) and variant.n == 1 and target.arch == 90 and bound:
        wrong[f"{measured:.1f} instructions per pair, not {bound}"] = measured > bound
    return [what for what, is_so in wrong.items() if is_so]


def widths(code: Code) -> str:
    """Loads and stores as bits x number."""
    return ", ".join(
        " ".join([{"LD": "load", "ST": "store"}[way]] + [
            f"{bits}x{count}" for (also, bits), count in sorted(code.accesses.items(), reverse=True) if also == way
        ])
        for way in ("LD", "ST")
    )  # fmt: skip


def examine(families: dict[str, list[Variant]], names: list[str]) -> int:
    """Print the table of these variants on these targets; the number of broken bounds."""
    print("| target | kernel | pairing | h, g, d | n | registers | spills | stack | accesses | per pair |")
    print("| --- " * 10 + "|")
    complaints = []
    for name in names:
        target = GPUTarget(*TARGETS[name])
        for family, variants in families.items():
            for variant in variants:
                for kernel in both(variant, target, FAMILIES[family]):
                    code = READERS[target.backend](kernel.asm)
                    row = (
                        name, f"{family} {kernel.name}", variant.pairing,
                        f"{variant.h}, {variant.g}, {variant.d}", variant.n, code.registers, code.spills, code.stack, widths(code),
                        f"{code.instructions / kernel.pairs:.1f}",
                    )  # fmt: skip
                    print("| " + " | ".join(map(str, row)) + " |", flush=True)
                    complaints += [
                        f"{row[:4]}: {what}" for what in broken(family, variant, kernel, code, target)
                    ]
    print(*complaints, sep="\n")
    return len(complaints)


QUICK = [Variant(learned=True), Variant("interleaved"), Variant(d=72, h=16, g=16), Variant(n=8, learned=True)]
ALL = [
    Variant(pairing, d, learned)
    for pairing in ("half", "interleaved", "block")
    for d in WIDTHS
    for learned in (False, True)
] + [Variant(n=8, learned=True), Variant(n=32, g=32, learned=True)]


def main() -> int:
    """Read the flags and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="few variants, those with a bound among them")
    arguments = parser.parse_args()
    variants = QUICK if arguments.quick else ALL
    return int(bool(examine(dict.fromkeys(FAMILIES, variants), arguments.targets)))


if __name__ == "__main__":
    sys.exit(main())
