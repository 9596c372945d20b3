"""The core needs torch alone; what needs more says which line installs it."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rope_mm.checks.extras import MissingPackage, extra

ROOT = Path(__file__).parents[2]


def torch_and_its_own(name: str = "torch") -> set[str]:
    """Names of torch and of the packages that it needs."""
    names, todo = set(), [name]
    while todo:
        if (name := todo.pop()) in names:
            continue
        names.add(name)
        for line in distribution(name).requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                try:
                    distribution(needed.name)
                    todo.append(needed.name)
                except PackageNotFoundError:
                    continue
    return names - {"triton", "numpy"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A folder with torch, what torch needs, and this package: links to the installed ones."""
    folder = tmp_path_factory.mktemp("bare")
    for name in torch_and_its_own():
        found = distribution(name)
        for top in {Path(file).parts[0] for file in found.files or () if not str(file).startswith("..")}:
            source = Path(str(found.locate_file(top)))
            if not (folder / top).exists() and source.exists():
                (folder / top).symlink_to(source)
    (folder / "rope_mm").symlink_to(ROOT / "rope_mm")
    (folder / "rope_mm_kernels").symlink_to(ROOT / "kernels" / "rope_mm_kernels")
    return folder


def run(bare: Path, code: str) -> subprocess.CompletedProcess:
    """Python that sees the standard library and one folder, where it starts."""
    command = [sys.executable, "-E", "-s", "-S", "-c", code]
    return subprocess.run(command, cwd=bare, capture_output=True, text=True)


def test_the_core_works_with_torch_alone(bare):
    done = run(
        bare,
        """
import warnings; warnings.filterwarnings("ignore", "Failed to initialize NumPy")
from importlib.util import find_spec
assert not any(map(find_spec, ("numpy", "transformers", "datasets", "scipy", "triton", "einops")))
import torch
import rope_mm.theory.flow, rope_mm.theory.dynamics, rope_mm.nn.blocks, rope_mm.cli
from rope_mm import Rotary, check_rotary
from rope_mm.evaluation.metrics import frechet
from rope_mm.losses import GAN_LOSSES
rope = Rotary(16, "rope-tv")
assert check_rotary(rope).ok
assert GAN_LOSSES["rsgan"].critic(torch.ones(2), torch.zeros(2)).isfinite()
x = torch.randn(64, 4)
assert frechet(x, x) < 1e-6
assert rope_mm.cli.main(["schemes", "rope-tv"]) == 0
print("worked")
""",
    )
    assert done.stdout.endswith("worked\n"), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("room", "package", "name"),
    [
        ("rope_mm.hf", "safetensors|transformers", "hf"),
        ("rope_mm.models", "transformers", "hf"),
        ("rope_mm.data", "datasets|PIL|numpy|sklearn|fsspec", "train"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(bare, room, package, name):
    done = run(bare, f"from {room} import *")
    expected = rf"MissingPackage: ({package}) is not installed; run: pip install 'rope-mm\[{name}\]'"
    assert re.search(expected, done.stderr), done.stderr[-2000:]


def test_every_module_is_imported_by_torch_alone_or_names_its_extra(bare):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "rope_mm").rglob("*.py"))
        if path.stem != "__main__" and ("hf" not in path.parts or path.match("hf/__init__.py"))  # lazy names
    ]
    done = run(
        bare,
        f"""
import warnings; warnings.filterwarnings("ignore", "Failed to initialize NumPy")
from importlib import import_module
import rope_mm
from rope_mm.checks.extras import MissingPackage
for name in {modules}:
    try:
        import_module(name)
        print(name, "imported")
    except MissingPackage as missing:
        print(name, missing)
""",
    )
    answers = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(answers) == modules, done.stderr[-2000:]
    assert answers["rope_mm.training.config"].endswith("run: pip install 'rope-mm[train]'")
    assert answers["rope_mm.evaluation.contact_sheet"].endswith("run: pip install 'rope-mm[train]'")
    assert answers["rope_mm.evaluation.metrics"] == "imported"


def test_the_command_train_without_its_extra_names_the_line(bare):
    done = run(
        bare, "import sys, rope_mm.cli; sys.exit(rope_mm.cli.main(['train', 'adversarial', '--help']))"
    )
    assert done.returncode == 2
    said = r"rope-mm: \w+ is not installed; run: pip install 'rope-mm\[train\]'"
    assert re.fullmatch(said, done.stderr.splitlines()[-1])


def test_a_training_program_without_its_extra_ends_in_one_line(bare):
    names = sorted(path.stem for path in (ROOT / "train").glob("*.py"))
    assert len(names) >= 12
    done = run(
        bare,
        f"""
import runpy, sys
for name in {names}:
    try:
        runpy.run_path({str(ROOT / "train")!r} + "/" + name + ".py", run_name="__main__")
    except ImportError as error:
        sys.excepthook(type(error), error, error.__traceback__)
""",
    )
    said = r"error: \w+ is not installed; run: pip install 'rope-mm\[train\]'"
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert len(lines) == len(names) and all(re.fullmatch(said, line) for line in lines), done.stderr[-2000:]


def test_a_clone_without_its_kernels_on_the_path_says_what_to_do(bare, tmp_path):
    for link in bare.iterdir():
        if link.name != "rope_mm_kernels":
            (tmp_path / link.name).symlink_to(link)
    done = run(tmp_path, "import rope_mm")
    assert "run `pip install -e .` in the folder of the repository" in done.stderr


def test_a_figure_without_matplotlib_names_its_line(bare):
    done = run(bare, "from rope_mm.analysis.figures import new_figure; new_figure(1, 1)")
    assert "matplotlib is not installed; run: pip install 'rope-mm[plots]'" in done.stderr


def test_an_error_of_this_package_is_not_taken_for_a_missing_one():
    with pytest.raises(ModuleNotFoundError, match=r"rope_mm\.absent") as caught, extra("hf"):
        import rope_mm.absent  # noqa: F401  # pyright: ignore
    assert not isinstance(caught.value, MissingPackage)


def test_every_extra_that_is_named_exists():
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    named = {
        found
        for path in (ROOT / "rope_mm").rglob("*.py")
        for found in re.findall(r'with extra\("(\w+)"\)', path.read_text())
    }
    assert named == {"hf", "train", "plots", "video"} and named <= set(declared)
