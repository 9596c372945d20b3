"""What the compiler makes of a launch, for GPUs that need not be here: nothing runs, all is counted."""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from rope_mm_kernels import norm_rotary, plan, rotary
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


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
        patch.object(plan, "lanes_of_a_warp", lambda x: target.warp_size),
        # tensors lie on the CPU here, where nothing would be launched
        patch.object(rotary, "launchable", lambda x: True),
        patch.object(norm_rotary, "launchable", lambda x: True),
        patch.object(torch.cuda, "device", lambda index: nullcontext()),
    ):
        yield launches


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
