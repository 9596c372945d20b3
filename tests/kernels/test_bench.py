"""The benches' arithmetic, with a clock that is not one; and that every contender turns heads alike."""

import json
import math
import sys
from itertools import count

import cases
import contenders
import cpu
import pytest
import report
import rotary
import torch

SMALL = cases.Shape(2, 5, 4, 2, 16, 3)


class Made:
    """A clock that calls once and says 2 ms, or 1.5 for a copy."""

    def kernel(self, call):
        return 1.5 if getattr(call(), "dtype", None) == torch.uint8 else 2.0

    wall = graph = kernel


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)


def rows_of(shape, layouts=cases.LAYOUTS, ways=rotary.WAYS):
    plans = (
        rotary.Plan(shape, layout, way, name, cases.floor(shape, rotary.WAYS[way]))
        for layout in layouts
        for way in ways
        for name, contender in contenders.CONTENDERS.items()
        if ("forward" if way in cases.DECODES else way) in contender.passes
    )
    return list(plans)


def test_the_bytes_per_token_are_those_of_the_documentation():
    model = cases.SHAPES[0]
    by_pass = {way: cases.floor(model, what) / model.s for way, what in cases.PASSES.items()}
    assert by_pass["forward"] == by_pass["backward"] == 20_480 + 4
    assert by_pass["backward with dOmega"] == by_pass["norm backward"] == 30_720 + 4
    assert by_pass["tables"] == 0


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_the_heads_of_every_shape_are_larger_than_any_cache(shape):
    assert cases.floor(shape, cases.Pass(1)) > 300e6


def test_the_bench_has_every_required_shape():
    heads = {shape[2:5] for shape in cases.SHAPES}
    assert heads == {(32, 8, 128), (28, 4, 128), (16, 16, 80), (16, 16, 72), (24, 24, 128), (8, 1, 128)}
    assert [shape.b for shape in cases.DECODE] == [1, 8, 128]


def test_the_dry_run_lists_every_row_on_any_machine(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rotary.py", "--dry-run"])
    assert rotary.main() == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == len(list(rotary.plans()))
    for word in (*cases.LAYOUTS, *rotary.WAYS, *contenders.CONTENDERS, *map(str, cases.SHAPES)):
        assert any(f"| {word} |" in line for line in lines), word


def test_without_a_gpu_the_bench_ends_with_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rotary.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rotary.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no GPU" in err and "--dry-run" in err


@pytest.mark.slow
def test_every_installed_contender_rotates_heads_alike_forward_and_backward(eager, device):
    rows = rotary.measure(rows_of(SMALL), Made(), device, torch.float32)
    assert {row.plan.way for row in rows} == set(rotary.WAYS)
    assert {"rope_mm", "rope_mm hf", "rope_mm table", "transformers", "Inductor"} <= {
        row.plan.contender for row in rows
    }
    assert [row.problem for row in rows if row.problem] == []
    assert all(row.share == 0.75 for row in rows if row.plan.bytes)


def test_a_contender_that_rotates_otherwise_or_fails_is_named_and_not_compared(monkeypatch, device):
    def sign(case):
        return lambda q, k: (q, -k)

    def fail(case):
        raise RuntimeError("no kernel image\nfor this card")

    peers = {
        "rope_mm": contenders.CONTENDERS["rope_mm"],
        "wrong": contenders.Contender("torch", {"forward": contenders.forward(sign)}),
        "failing": contenders.Contender("torch", {"forward": fail}),
        "absent": contenders.Contender("no_such_package", {"forward": fail}),
    }
    for module in (contenders, rotary):
        monkeypatch.setattr(module, "CONTENDERS", peers)
    rows = rotary.measure(rows_of(SMALL, ["BSHD"], ["forward"]), Made(), device, torch.float32)
    ours, wrong, failing = rows
    assert not ours.problem and wrong.problem.startswith("wrong by")
    assert failing.problem == "RuntimeError: no kernel image"
    assert math.isnan(rotary.beside(wrong, rows)) and math.isnan(rotary.beside(failing, rows))
    peers["rope_mm"] = peers["failing"]
    with pytest.raises(RuntimeError, match="no kernel image"):
        rotary.measure(rows_of(SMALL, ["BSHD"], ["forward"]), Made(), device, torch.float32)


def made_up():
    """Ours at 80 % of a copy, one peer at 40 % and one at 20 %."""
    plans = [rotary.Plan(SMALL, "BSHD", "forward", name, 10**9) for name in ("rope_mm", "Inductor", "fla")]
    return [rotary.Row(plan, ms, 0.8) for plan, ms in zip(plans, (1.0, 2.0, 4.0), strict=True)]


def test_the_table_has_rates_shares_and_ratios():
    lines = rotary.show(made_up(), compared=True).splitlines()
    assert [line.split(" | ")[4:9] for line in lines[2:]] == [
        ["1000.0", "1.0000", "1000", "80%", "1.00"],
        ["1000.0", "2.0000", "500", "40%", "2.00"],
        ["1000.0", "4.0000", "250", "20%", "4.00"],
    ]


def test_goals_are_compared_with_the_worst_row():
    lines = rotary.goals(made_up()).splitlines()[2:]
    assert lines == [
        "| forward, share of copy | >= 93% | 80% | no |",
        "| time of the fastest peer / ours | >= 1.0 | 2.00 | yes |",
        "| time of the median peer / ours | >= 1.3 | 3.00 | yes |",
    ]


@pytest.mark.parametrize(
    ("flags", "green", "code"), [([], True, 0), ([], False, 1), (["--no-tests"], True, 0)], ids=str
)
def test_nothing_is_compared_unless_the_tests_pass(flags, green, code, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rotary.py", "--out", str(tmp_path), *flags])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        report, "provenance", lambda packages: dict.fromkeys(("device", *packages, "commit"), "x")
    )
    monkeypatch.setattr(rotary, "tested", lambda: green)
    monkeypatch.setattr(rotary, "measure", lambda *_: [*made_up(), rotary.Row(made_up()[0].plan)])
    assert rotary.main() == code
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "rotary.json").read_text())
    compared = green and not flags
    assert ("80%" in printed) == ("share" in content["rows"][0]) == compared
    assert content["rows"][0]["ms"] == 1.0 and content["rows"][3]["ms"] is None
    assert content["tests"] == ("passed" if compared else "not run" if flags else "failed")
    assert {path.name for path in tmp_path.iterdir()} == {"rotary.json", *(["rotary.png"] * compared)}
    if compared:
        assert (tmp_path / "rotary.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "found.json"
    report.write_json(path, [1])

    def half(part):
        part.write_text("[2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        report.write_whole(path, half)
    assert json.loads(path.read_text()) == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_the_report_names_the_machine_and_the_versions():
    facts = report.provenance(["torch", "no-such-package"])
    assert facts["torch"] == torch.__version__ and facts["no-such-package"] == "not installed"
    assert facts["device"] and facts["command"].startswith("python ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_on_a_cpu_rotate_heads_alike(eager, dtype):
    q, k = (torch.randn(1, 7, heads, 128, dtype=dtype) for heads in (4, 2))
    calls = cpu.contenders(7, dtype)
    ours = calls["rope_mm"](q, k)
    assert all(torch.equal(x, y) for x, y in zip(calls["copy"](q, k), (q, k), strict=True))
    close = {"atol": 0.1, "rtol": 0} if dtype == torch.bfloat16 else {}
    for x, y, z in zip(ours, calls["transformers"](q, k), calls["rope_mm compiled"](q, k), strict=True):
        torch.testing.assert_close(x, y.transpose(1, 2), **close)
        torch.testing.assert_close(x, z, **close)


def test_ratios_on_a_cpu_compare_calls_of_one_round(eager, monkeypatch):
    seconds = {"copy": 4, "transformers": 10, "rope_mm": 3, "rope_mm compiled": 6}
    learned = {"rope_mm, learned Omega": 4, "rope_mm, learned Omega per head": 5}
    seconds |= learned
    now = [0]

    def slow(name):
        def call(q, k):
            now[0] += seconds[name]
            return q * 1, k * 1

        return call

    monkeypatch.setattr(cpu, "contenders", lambda tokens, dtype, d: {name: slow(name) for name in seconds})
    found = {
        (name, way, row.contender): (row.ratio, row.ms)
        for name in cpu.DTYPES
        for way in cpu.PASSES
        for row in cpu.compare(3, name, way, 5, lambda: now[0])
    }
    assert found == {
        ("float32", "forward", "rope_mm"): (0.3, 3000),
        ("float32", "forward", "rope_mm compiled"): (1.5, 6000),
        ("float32", "forward+backward", "rope_mm"): (0.3, 3000),
        ("bfloat16", "forward", "rope_mm"): (0.3, 3000),
        ("bfloat16", "forward+backward", "rope_mm"): (0.3, 3000),
        **{
            (name, "forward+backward", who): (x / 10, 1e3 * x)
            for name in cpu.DTYPES
            for who, x in learned.items()
        },
    }


def test_the_first_call_of_a_round_is_not_counted_and_missed_goals_are_reported():
    ticks, calls = count(), []
    both = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = cpu.alternate(both, 2, lambda: next(ticks))
    assert times == {"a": [1, 1], "b": [1, 1]}
    assert calls == (["a"] * (cpu.CALLS + 1) + ["b"] * (cpu.CALLS + 1)) * 2
    row = cpu.Row("8", "float32", "forward", "rope_mm", "transformers", 3.0, 4.0, 0.75, 0.7, 0.8, 0.5)
    assert "0.75 (0.70 to 0.80) |  | <= 0.5, missed" in cpu.show([row])
    assert "(0.70 to 0.80) | 0.60 | <= 0.5, missed" in cpu.show([row._replace(least=0.6)])
    assert "missed" not in cpu.show([row._replace(ratio=0.4)])
