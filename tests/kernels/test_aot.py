"""The kernels, compiled for GPUs that are not here: no spills, wide accesses, few instructions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# one target stands for all where the code is the same but for the chip
BOUNDS = """
import aot
wrong = aot.examine(aot.QUICK, ["sm_90"]) + aot.examine(aot.QUICK[:1], ["sm_80", "gfx942"])
assert not wrong, wrong
"""
# what the table leaves out: the interpreter takes code that the compiler does not
OPTIONS = """
import aot, machine, torch
from rope_mm_kernels import norm_rotate_by_table, rotate, rotate_, rotate_by_table
q, k = (torch.zeros(1, 256, heads, 72, requires_grad=True, dtype=torch.float16) for heads in (6, 3))
positions, omega = torch.zeros(256, 2, requires_grad=True), torch.zeros(3, 2, 24, requires_grad=True)
cos, weight = torch.zeros(1, 256, 48), torch.zeros(72, requires_grad=True)
unequal = dict(pairing="block", blocks=(8, 16), tail=True, factor=1.5, mode="hf")
with machine.compiling(aot.GPUTarget(*aot.TARGETS["sm_90"])) as launches:
    for out in (
        rotate(q, k, positions, omega, **unequal),
        aot.normed(q, k, positions, omega, **unequal),
        rotate_by_table(q, k, cos, cos, "interleaved"),
        norm_rotate_by_table(q, k, cos, cos, weight, weight, pairing="block", blocks=(8, 16), tail=True),
    ):
        torch.autograd.backward(out, [torch.zeros_like(x) for x in out])
    with torch.no_grad():
        rotate_(q, k, positions.long(), omega[:1].double(), "interleaved")
codes = [machine.read_cuda(launch.asm) for launch in launches]
assert len(codes) == 10 and not any(code.spills or code.stack for code in codes), codes
"""


@pytest.mark.slow
@pytest.mark.parametrize("calls", [BOUNDS, OPTIONS], ids=["bounds", "options"])
def test_kernels_compile_without_spills_and_within_the_bounds_of_the_bench(
    calls: str, tmp_path: Path
) -> None:
    # a process of its own: here the kernels may be interpreted, and the compiler needs real ones
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    folders = [str(ROOT / "kernels"), str(ROOT / "kernels" / "bench"), *sys.path]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", calls], env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
