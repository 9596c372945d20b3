"""The project for the Kernel Hub: what it holds, and that its package turns heads as ours does."""

import importlib.util
import sys
from pathlib import Path

import pytest
import rope_mm_kernels
import torch
from truth import Case

HUB = Path(__file__).parents[2] / "kernels" / "hub"


def load(name, path):
    """A module or package of this name, from this file."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


writer = load("hub_writer", HUB / "write.py")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    writer.write(folder, writer.project("someone/rope-mm-kernels"))
    return folder


@pytest.fixture(scope="module")
def package(project):
    name = "rope_mm_kernels_from_the_hub"
    yield load(name, project / "torch-ext" / "rope_mm_kernels" / "__init__.py")
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def test_the_project_has_the_files_that_the_builder_asks_for(project):
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    build = tomllib.loads((project / "build.toml").read_text())
    assert build["general"]["hub"]["repo-id"] == "someone/rope-mm-kernels"
    folder = build["general"]["name"].replace("-", "_")
    assert (project / "torch-ext" / folder / "__init__.py").exists()
    assert "torch-noarch" in build
    for name in ("flake.nix", "CARD.md", "LICENSE", "tests/test_rope_mm_kernels.py"):
        assert (project / name).read_text()
    card = (project / "CARD.md").read_text()
    assert "someone/rope-mm-kernels" in card and "REPO_ID" not in card


def test_the_built_kernel_package_has_every_module_and_imports_none_of_rope_mm(project, package):
    theirs = {path.name for path in (project / "torch-ext" / "rope_mm_kernels").iterdir()} - {"__pycache__"}
    ours = {path.name for path in Path(rope_mm_kernels.__file__).parent.glob("*.py")}
    assert theirs == ours | {"layers.py"}
    assert {*rope_mm_kernels.__all__, "layers"} == set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__name__.startswith(package.__name__) or (
            getattr(package, name).__module__.startswith(package.__name__)
        )


def test_the_built_kernel_package_gives_the_outputs_and_gradients_of_ours(package, device):
    inputs = Case().make(device)
    for ours, theirs in (
        (rope_mm_kernels.rotate, package.rotate),
        (rope_mm_kernels.rotate, package.layers.rotate()),
    ):
        results = []
        for turn in (ours, theirs):
            q, k = turn(*inputs)
            results.append((q, k, *torch.autograd.grad(q.square().sum() + k.cos().sum(), inputs)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("axis", [1, 2])
def test_the_built_layer_equals_the_function_of_transformers_with_gradients(axis, package, device):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (torch.randn(2, 5, heads, 16, device=device, requires_grad=True) for heads in (4, 2))
    angle = torch.randn(2, 5, 8, device=device).repeat(1, 1, 2)
    layer = package.layers.apply_rotary_transformers()
    found = []
    for turn in (layer, apply_rotary_pos_emb):
        heads = [x.transpose(1, 2) if axis == 1 else x for x in (q, k)]
        out = turn(*heads, angle.cos(), angle.sin(), unsqueeze_dim=axis)
        found.append((*out, *torch.autograd.grad(sum(x.pow(3).sum() for x in out), (q, k))))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)


def test_kernelize_accepts_the_built_layers(package):
    assert package.layers.__all__
    for name in package.layers.__all__:
        layer = getattr(package.layers, name)
        members = {member for member in vars(layer) if not member.startswith("__")}
        assert members == {"forward", "has_backward", "can_torch_compile"}
        assert "__init__" not in vars(layer) and layer.has_backward


def test_every_import_is_made_relative_or_refused():
    text = "from rope_mm_kernels.a.b import c\ndef f():\n    from rope_mm_kernels import d\n"
    assert writer.relative(text) == "from .a.b import c\ndef f():\n    from . import d\n"
    for bad in ("import rope_mm_kernels", "import rope_mm_kernels.table as t"):
        with pytest.raises(ValueError, match="relative"):
            writer.relative(bad)


def test_a_folder_that_is_not_empty_is_left_unchanged(project, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="holds files already"):
        writer.write(project, {})
    out = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["write.py", "--out", str(out), "--repo-id", "a/b"])
    writer.main()
    printed = capsys.readouterr().out
    assert str(out / "build.toml") in printed
    assert ("not installed" in printed) == (importlib.util.find_spec("kernels") is None)
