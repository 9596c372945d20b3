"""The largest error of cosine and sine by position, of each mode, against float64; runs anywhere.

    python kernels/bench/accuracy.py      4096 real positions below each bound, 64 frequencies, 1 to 1 / base

Without a GPU the kernel is interpreted; before Triton 3.9 without an fma that rounds once, so the script puts
one in.
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are decorated

from rope_mm_kernels import rotate  # noqa: E402
from rope_mm_kernels.checks import MODES  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


def fma(self, x, y, z):
    """Round once, as hardware does."""
    wide = x.data.astype("float64") * y.data + z.data
    return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def error(positions: torch.Tensor, omega: torch.Tensor, mode: str) -> float:
    """Of cosine and sine, which are what (1, 0) turns to."""
    r = omega.shape[-1]
    q = torch.zeros(1, len(positions), 1, 2 * r, device=DEVICE)
    q[..., :r] = 1.0
    angle = positions.double() @ omega
    turned = rotate(q, q[:, :, :0], positions, omega.float() if mode == "hf" else omega, mode=mode)[0]
    return (turned[0, :, 0].cpu() - torch.cat((angle.cos(), angle.sin()), -1)).abs().max().item()


def main() -> None:
    """Print the table."""
    if DEVICE == "cpu":
        interpreter.InterpreterBuilder.create_fma = fma
    random = torch.Generator().manual_seed(0)
    print("| base | positions below |", *(f"{mode} |" for mode in MODES))
    print("| --- " * (2 + len(MODES)) + "|")
    for base in (1e4, 5e6):
        omega = base ** -torch.linspace(0, 1, 64, dtype=torch.float64)[None]
        for power in (12, 15, 17, 20, 23):
            positions = torch.rand(4096, 1, generator=random) * 2**power
            print(
                f"| {base:.0e} | 2^{power} |", *(f"{error(positions, omega, mode):.1e} |" for mode in MODES)
            )


if __name__ == "__main__":
    main()
