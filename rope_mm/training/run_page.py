"""OUTPUT_DIR/index.html: curves, samples, configuration and command of a run, or of a comparison of runs."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rope_mm.analysis import web_page
from rope_mm.checks.extras import MissingPackage
from rope_mm.files import write_text
from rope_mm.training.history import command, history_rows, read_history
from rope_mm.training.metrics_log import read_metrics

FILE = "index.html"
DATA = "data.png"
SAMPLE = re.compile(r"step-(\d+)-?(.*)")
ROWS = 16  # of generated texts
NOT_EVALUATED = "nothing was evaluated: images need data.label, and texts a template that ends in text"
FRAMES, COMPARED = 40, 10  # of an animation, at most, and of one on the page of a comparison
Curves = dict[str, list[tuple[float, float]]]


def write_run_page(output_dir: Path) -> str:
    """Write the page of a run as far as it has come.

    Args:
        output_dir: the run's folder.

    Returns:
        What the page lacks, in a sentence; empty where it is whole.
    """
    lines = read_metrics(output_dir)
    figure, lacking = draw(group_curves(read_curves(lines)))
    warnings = [f"step {line['step']}: {line['warning']}" for line in lines if "warning" in line]
    sections = {
        "Result": show_result(output_dir, last_step(lines)),
        "Model": show_model(output_dir / "model"),
        "Warnings": "".join(map(web_page.paragraph, dict.fromkeys(warnings))),
        "Curves": figure,
        "Samples": show_samples(output_dir, last_step(lines)),
        "Data": show_data(output_dir / DATA),
        "History": show_history(output_dir),
        "Command": web_page.preformatted(command()),
        "Configuration": show_file(output_dir / "run.yaml"),
        "Versions": show_file(output_dir / "versions.json"),
    }
    write_text(output_dir / FILE, web_page.page(output_dir.name, sections))
    return lacking


def write_comparison_page(
    output_dir: Path,
    table: str,
    figures: Sequence[str],
    settings: Mapping[str, Any],
    runs: Mapping[str, Path] | None = None,
    curves: Mapping[str, Curves] | None = None,
) -> str:
    """Write the page of a comparison.

    Args:
        output_dir: the comparison's folder.
        table: in Markdown.
        figures: names of PNG files in the folder.
        settings: of the comparison.
        runs: name -> folder of a run, inside that of the comparison; its samples are shown, and a link.
        curves: name of a run -> curves; those of `runs` where none are given.

    Returns:
        What the page lacks, in a sentence; empty where it is whole.
    """
    lines = {name: read_metrics(folder) for name, folder in (runs or {}).items()}
    if curves is None:
        curves = {name: read_curves(found) for name, found in lines.items()}
    figure, lacking = draw(compare_curves(curves))
    images = [web_page.image((output_dir / name).read_bytes(), "png", Path(name).stem) for name in figures]
    links = [
        f"<li>{web_page.link(f'{folder.name}/{FILE}', name)}</li>"
        for name, folder in (runs or {}).items()
        if (folder / FILE).exists()
    ]
    samples = {
        f"Samples of {name}": show_samples(folder, last_step(lines[name]), COMPARED)
        for name, folder in (runs or {}).items()
    }
    sections = {
        "Result": web_page.from_markdown(table),
        "Figures": "\n".join(images),
        "Curves": figure,
        "Runs": f"<ul>{''.join(links)}</ul>" if links else "",
        **samples,
        "Command": web_page.preformatted(command()),
        "Settings": web_page.preformatted(json.dumps(settings, indent=1)),
    }
    write_text(output_dir / FILE, web_page.page(output_dir.name, sections))
    return lacking


def draw(panels: Mapping[str, Curves]) -> tuple[str, str]:
    """Curves as SVG, or without matplotlib the sentence that says so; and that sentence, or nothing."""
    try:
        return web_page.curves(panels), ""
    except MissingPackage as error:
        lacking = f"no curves: {error}"
        return web_page.paragraph(lacking), lacking


def last_step(lines: Sequence[Mapping[str, Any]]) -> int:
    """The step of the last line of metrics; 0 without any."""
    return lines[-1]["step"] if lines else 0


def read_curves(lines: Sequence[Mapping[str, Any]]) -> Curves:
    """Metric -> points (step, value), of the numbers in lines of metrics."""
    found: Curves = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, []).append((line["step"], value))
    return found


def group_curves(curves: Curves) -> dict[str, Curves]:
    """The panels of a run: curves whose names begin with the same word before a / share one."""
    panels: dict[str, Curves] = {}
    for name, points in curves.items():
        group, _, own = name.partition("/")
        panels.setdefault(group, {})[own or name] = points
    return panels


def compare_curves(runs: Mapping[str, Curves]) -> dict[str, Curves]:
    """The panels of a comparison: one for each metric, with a curve for each run that has it."""
    panels: dict[str, Curves] = {}
    for run, curves in runs.items():
        for name, points in curves.items():
            panels.setdefault(name, {})[run] = points
    return panels


def show_result(output_dir: Path, step: int) -> str:
    """The result of a finished run, or that there is none.

    Args:
        output_dir: of the run.
        step: of the last line of its log.
    """
    path = output_dir / "result.json"
    if not path.exists():
        return web_page.paragraph(f"not finished: the log ends at step {step}") if step else ""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [(name, f"{value:.6g}" if isinstance(value, float) else value) for name, value in result.items()]
    parts = [web_page.html_table(("metric", "value"), rows)] if rows else []
    if lack := describe_lack(result):
        parts.append(web_page.paragraph(lack))
    return "".join(parts)


def describe_lack(result: Mapping[str, Any]) -> str:
    """Why a result has no metrics, counts of what was skipped aside; empty where it has some."""
    return NOT_EVALUATED if all(name.startswith("skipped") for name in result) else ""


def show_model(folder: Path) -> str:
    """Links to the weights, with their sizes; empty where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    links = [web_page.link(f"{folder.name}/{file.name}", f"{folder.name}/{file.name}") for file in files]
    sizes = [f"{file.stat().st_size / 1e6:.2f} MB" for file in files]
    items = "".join(f"<li>{link}, {size}</li>" for link, size in zip(links, sizes, strict=True))
    return f"<ul>{items}</ul>" if items else ""


def show_data(path: Path) -> str:
    """The sheet of data, as the model reads it; empty where there is none."""
    return web_page.image(path.read_bytes(), "png", "rows as the model reads them") if path.exists() else ""


def show_history(output_dir: Path) -> str:
    """When a run was begun, stopped, resumed, extended and finished, and by which commands."""
    rows = history_rows(read_history(output_dir))
    return web_page.html_table(("time (UTC)", "step", "event", "versions", "command"), rows) if rows else ""


def find_samples(output_dir: Path, suffix: str, until: int) -> dict[str, dict[int, Path]]:
    """Files of samples: what the name says behind the step -> step -> file, in the order of steps.

    Args:
        output_dir: of a run.
        suffix: of the files.
        until: the last step; a run that was killed may have left samples of a later one.
    """
    found: dict[str, dict[int, Path]] = {}
    for path in (output_dir / "samples").glob(f"step-*{suffix}"):
        if (match := SAMPLE.fullmatch(path.stem)) and int(match[1]) <= until:
            found.setdefault(match[2], {})[int(match[1])] = path
    return {name: dict(sorted(files.items())) for name, files in sorted(found.items())}


def show_samples(output_dir: Path, until: int, most: int = FRAMES) -> str:
    """Generated images as animations over the steps, and the newest generated texts; empty without samples.

    Args:
        output_dir: of a run.
        until: the last step.
        most: frames of an animation.
    """
    parts = []
    for name, files in find_samples(output_dir, ".png", until).items():
        steps = list(files)
        data = web_page.animation({f"step {step}": path for step, path in files.items()}, most)
        parts.append(web_page.image(data, "webp", f"{name or 'images'}, steps {steps[0]} to {steps[-1]}"))
    for name, files in find_samples(output_dir, ".txt", until).items():
        step, path = list(files.items())[-1]
        rows = [line.partition(" | ")[::2] for line in path.read_text(encoding="utf-8").splitlines()[:ROWS]]
        parts.append(web_page.paragraph(f"{name}, step {step}"))
        parts.append(web_page.html_table(("true", "generated"), rows))
    return "\n".join(parts)


def show_file(path: Path) -> str:
    """A text file as it is; empty where there is none."""
    return web_page.preformatted(path.read_text(encoding="utf-8")) if path.exists() else ""
