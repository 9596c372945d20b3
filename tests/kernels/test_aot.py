"""Every kernel as the launcher asks for it, compiled for GPUs that are not here: no spills, wide accesses."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton")


class Variant(NamedTuple):
    """A forward and a backward: heads h of q and g of k, d channels, r pairs, a axes, n rows of heads."""

    pairing: str
    h: int
    g: int
    d: int
    r: int
    a: int
    n: int = 1
    learned: bool = False


LANGUAGE_MODEL = Variant("half", 32, 8, 128, 64, 3, learned=True)
VARIANTS = [
    LANGUAGE_MODEL,
    Variant("interleaved", 32, 8, 128, 64, 3),
    Variant("interleaved", 32, 8, 128, 64, 1, learned=True),
    Variant("half", 32, 8, 128, 64, 3, n=8, learned=True),
    Variant("half", 16, 16, 64, 32, 1),
    Variant("interleaved", 16, 16, 72, 36, 3, n=16, learned=True),
    Variant("half", 24, 24, 72, 32, 3, learned=True),
]
TARGETS = {"sm_90": ("cuda", 90, 32), "sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}


class Driver:
    """As much of a GPU as the compiler asks about."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compiled(target, variant):
    """The kernels of one forward and backward, which are compiled and then not run."""
    import torch
    from rope_mm_kernels.rotary import rotate
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    pairing, h, g, d, r, a, n, learned = variant
    q, k = (torch.zeros(2, 8, heads, d, dtype=torch.bfloat16, requires_grad=True) for heads in (h, g))
    positions = torch.zeros(8, a, requires_grad=learned)
    omega = torch.zeros((n, a, r) if n > 1 else (a, r), requires_grad=learned)
    run, kernels = JITFunction.run, []
    driver.set_active(Driver(target))
    JITFunction.run = lambda *args, **kw: kernels.append(run(*args, **{**kw, "warmup": True}))
    try:
        out = rotate(q, k, positions, omega if learned else omega.double(), pairing)
        torch.autograd.backward(out, [torch.zeros_like(x) for x in out])
    finally:
        JITFunction.run = run
    return kernels


def inspect_cuda(kernel):
    """Registers, bytes of stack, and every memory instruction."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        show = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", show[0])[1]) for word in ("REG", "STACK", "LOCAL")
    )
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9._]+)", show[1])
    return registers, stack + local, [word for word in code if re.match("LD[GL]|ST[GL]", word)], len(code)


def inspect_hip(kernel):
    """Registers, bytes of scratch, and every memory instruction."""
    code = kernel.asm["amdgcn"]
    names = "vgpr_count", "private_segment_fixed_size", "vgpr_spill_count"
    registers, scratch, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in names)
    return (
        registers,
        scratch + spilled,
        re.findall(r"(?:buffer|global)_(?:load|store)_\w+", code),
        code.count("\n"),
    )


def report(name):
    """Print what is measured of every kernel for one target, and complain of what must not be."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget(*TARGETS[name])
    inspect, narrow = (
        (inspect_cuda, r"U?[SU]\d+$") if target.backend == "cuda" else (inspect_hip, r"short|byte")
    )
    wide = r"\.(64|128)$" if target.backend == "cuda" else r"dwordx[24]"
    # one stands for all where the code is the same but for the chip
    for variant in VARIANTS if name == "sm_90" else [LANGUAGE_MODEL]:
        for way, kernel in zip(("forward", "backward"), compiled(target, variant), strict=True):
            registers, stack, accesses, length = inspect(kernel)
            print(name, variant, way, f"{registers} registers, {length} instructions, {stack} bytes of stack")
            assert not stack, "spills"
            assert registers <= 128, "few blocks fit"
            assert not [access for access in accesses if re.search(narrow, access)], accesses
            assert any(re.search(wide, access) for access in accesses), accesses


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_without_spills_and_move_wide_words(name: str, tmp_path: Path) -> None:
    # a process of its own: here the kernels may be interpreted, and the compiler needs real ones
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__, name], env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    report(sys.argv[1])
