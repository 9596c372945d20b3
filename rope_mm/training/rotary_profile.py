"""Rotary's share of the time of training steps, by torch's profiler."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Result = TypeVar("Result")
ANGLES = "rotary angles"  # the name under which a model records the making of angles
ROTATION = {ANGLES, *(name + way for name in ("ApplyRotary", "Rotate") for way in ("", "Backward"))}
WARM = 3  # steps before the first that counts


class Share(NamedTuple):
    """Milliseconds a step of rotation and of everything.

    Attributes:
        rotary: of rotation, and of making its angles.
        total: of everything.
        where: "cpu", or "device" on an accelerator.
    """

    rotary: float
    total: float
    where: str

    def __str__(self) -> str:
        if not self.rotary:
            return "rotary's share of step time: unknown; compiled code rotates inside other operations"
        parts = f"{self.rotary:.2f} of {self.total:.2f} ms a step"
        return (
            f"rotary's share of step time: {self.rotary / self.total:.1%} ({parts}, {self.where}, profiled)"
        )


def rotary_share(events: Iterable[Any], steps: int, where: str) -> Share:
    """The share in a profile's events; what a rotation calls is a part of it.

    The profiler's own time is in both, and weighs more where operations are small.

    Args:
        events: of torch's profiler.
        steps: how many steps they cover.
        where: "cpu" or "device", whose time counts.
    """

    def inside(event: Any) -> bool:
        above = event.cpu_parent
        while above is not None and above.name not in ROTATION:
            above = above.cpu_parent
        return above is not None

    host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    rotary = [getattr(e, f"{where}_time_total") for e in host if e.name in ROTATION and not inside(e)]
    total = (getattr(e, f"self_{where}_time_total") for e in host)
    return Share(sum(rotary) / 1e3 / steps, sum(total) / 1e3 / steps, where)


def measure_share(step: Callable[[], object], steps: int) -> Share:
    """Rotary's share of a number of calls of a step."""
    where = "device" if torch.cuda.is_available() else "cpu"
    gpu = [ProfilerActivity.CUDA] if where == "device" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as seen:
        for _ in range(steps):
            with record_function("step"):  # to which the time between operations belongs
                step()
    return rotary_share(seen.events() or (), steps, where)


def profiled(
    step: Callable[[int], Result], steps: int, report: Callable[[Share], None]
) -> Callable[[int], Result]:
    """The same step, of which some calls, after the first few, are profiled.

    Args:
        step: takes its number.
        steps: how many calls are profiled.
        report: is called once with rotary's share.
    """
    calls, results = 0, []

    def call(number: int) -> Result:
        nonlocal calls
        calls += 1
        if not WARM < calls <= WARM + steps:
            return step(number)
        share = measure_share(lambda: results.append(step(number)), 1)
        shares.append(share)
        if calls == WARM + steps:
            rotary, total, (where, *_) = zip(*shares, strict=True)
            report(Share(sum(rotary) / steps, sum(total) / steps, where))
        return results.pop()

    shares: list[Share] = []
    return call
