"""How many threads torch takes on the CPU."""

import os
import time
from collections.abc import Callable

import torch

TRIAL = 0.1  # seconds of a trial, so long that the scheduler's turns average out
GAIN = 1.1  # over the speed of fewer threads, which more threads must reach


def choose_threads(threads: int) -> int:
    """Let torch take a number of threads, and return it.

    `OMP_NUM_THREADS` is a limit. Without a number the machine is tried: where another
    job holds a core, threads wait for each other, and fewer of them are many times faster.

    Args:
        threads: the number that a configuration asks for, 0 for none.
    """
    limit = os.environ.get("OMP_NUM_THREADS", "")
    limited = limit.isdigit() and int(limit) > 0
    most = int(limit) if limited else threads or torch.get_num_threads()
    chosen = min(threads, most) or fastest(most, speed_of)
    torch.set_num_threads(chosen)
    return chosen


def fastest(most: int, speed: Callable[[int], float]) -> int:
    """Of 1, 2, 4, ... and `most` threads the first that no larger number beats by much.

    Args:
        most: the largest number.
        speed: of a trial with a number of threads.
    """
    if most == 1:
        return 1
    counts = [count for count in (2**power for power in range(most.bit_length())) if count < most] + [most]
    chosen, best = counts[0], speed(counts[0])
    for count in counts[1:]:
        if (found := speed(count)) > GAIN * best:
            chosen, best = count, found
    return chosen


def speed_of(threads: int) -> float:
    """How often in a second a small layer runs forward and backward with a number of threads."""
    torch.set_num_threads(threads)
    x, weight = torch.ones(512, 128), torch.ones(128, 256, requires_grad=True)
    torch.relu(x @ weight).sum().backward()  # starts the threads
    start, calls = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < TRIAL:
        torch.relu(x @ weight).sum().backward()
        calls += 1
    return calls / taken
