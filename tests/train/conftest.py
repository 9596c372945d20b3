"""Data of 4 x 4 pixels, and runs of the training scripts on models of toy size."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from safetensors.torch import load_file

from rope_mm.data import EMBEDDED
from rope_mm.training.config import load, run
from rope_mm.training.image_heads import IMAGE_HEADS

ROOT = Path(__file__).parents[2]
TEMPLATES = (
    "['{caption}{image:generate}', '{image}?{caption}', '{frames:generate}{caption}', "
    "'{image}{frames:generate}']"
)
ADVERSARIAL = {
    "config": ROOT / "configs" / "adversarial" / "digits.yaml",
    "steps": 6, "global_batch_size": 2, "log_every": 1, "sample_every": 6,
    "checkpoint_every": 2, "threads": 1, "page": False, "data.label": "", "tokenizer": "bytes",
    "model.hidden_size": 16, "model.intermediate_size": 16, "model.patch_size": 2,
    "model.num_hidden_layers": 1,
}  # fmt: skip
PRETRAIN = {
    "config": ROOT / "configs" / "pretrain" / "tiny.yaml",
    "steps": 4, "global_batch_size": 8, "max_length": 64, "log_every": 1, "sample_every": 100,
    "checkpoint_every": 2, "threads": 1, "page": False, "num_workers": 0, "tokenizer": "bytes",
    "image_head": "mse",
    "image_loss_weight": 1.0, "guidance_scale": 1.0, "optim.lr": 2e-3, "optim.warmup_steps": 2,
    "model.patch_size": 2, "model.hidden_size": 16, "model.intermediate_size": 16,
    "model.num_hidden_layers": 1, "model.num_attention_heads": 2, "model.num_key_value_heads": 2,
    "data.templates": TEMPLATES, "data.size": 4, "data.channels": 1,
}  # fmt: skip


# documents of one caption in groups of four, for heads that compare images of one text
GROUPS = {
    "global_batch_size": 12, "data.group_by": "caption", "data.group_size": 4,
    "data.templates": '["{caption}{image:generate}"]',
}  # fmt: skip


def for_head(head):
    """The flags of an image head."""
    return {"image_head": head, **(GROUPS if IMAGE_HEADS[head].conditions else {})}


class Toy:
    """A training script, and the flags of a run of toy size; changes replace some of them."""

    def __init__(self, name, settings):
        module = __import__(name)
        self.name, self.settings, self.module = name, settings, module
        self.path, self.main = ROOT / "train" / f"{name}.py", module.main
        self.schema = getattr(module, name.title())

    def flags(self, output_dir, **changes):
        settings = {**self.settings, "output_dir": output_dir, **changes}
        return [text for key, value in settings.items() for text in (f"--{key}", str(value))]

    def config(self, output_dir, **changes):
        return load(self.schema, self.flags(output_dir, **changes))

    def train(self, output_dir, **changes):
        """The result of a run."""
        self.main(self.config(output_dir, **changes))
        return json.loads((output_dir / "result.json").read_text())

    def run(self, output_dir, **changes):
        """Run it as its command line does; the exit code."""
        try:
            run(self.main, self.schema, self.flags(output_dir, **changes))
        except SystemExit as stopped:
            return stopped.code
        return 0

    def command(self, output_dir, **changes):
        return [sys.executable, str(self.path), *self.flags(output_dir, **changes)]

    def torchrun(self, output_dir, *, script=None, processes=2, **changes):
        """The same run in several processes."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
        arguments = [*(script or [str(self.path)]), *self.flags(output_dir, **changes)]
        env = environment(ACCELERATE_USE_CPU="true")
        done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-6000:]}"


def environment(**more):
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "train"))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def weights(output_dir):
    return load_file(output_dir / "model" / "model.safetensors")


def equal(ours, theirs):
    """Whether two nests of tensors and numbers are the same to the bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return bool((ours == theirs).all()) if hasattr(ours, "all") else ours == theirs


def lines(output_dir):
    path = output_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def forget(output_dir, step):
    """Leave the run as it was at a step."""
    for path in (output_dir / "checkpoints").iterdir():
        if path.name > f"step-{step:06d}":
            shutil.rmtree(path)
    shutil.rmtree(output_dir / "model")


@pytest.fixture(autouse=True, scope="session")
def embedded_rows_are_made_once():
    """Rows of embedded sources are the same in every run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, make in EMBEDDED.items():
            patch.setitem(EMBEDDED, name, cache(make))
        yield


@pytest.fixture(scope="session")
def runs():
    """What a run left: its weights, its metrics, its first steps alone, whether two are the same."""
    return SimpleNamespace(
        environment=environment,
        weights=weights,
        lines=lines,
        forget=forget,
        equal=equal,
        same=lambda one, two: equal(weights(one), weights(two)),
    )


@pytest.fixture
def accelerate_command():
    """The path of the program `accelerate`, which imports timm where that is installed."""
    made = (Path(sys.prefix) / "installed").exists()  # the environment is that of `make`
    if find_spec("timm") is not None and not made and find_spec("torchvision") is None:
        pytest.skip("the accelerate command imports timm, which wants torchvision: pip uninstall timm")
    return shutil.which("accelerate", path=Path(sys.executable).parent)


@pytest.fixture
def check_close(runs):
    """A function that compares weights and metrics of two runs."""

    def compare(one, two, within=1e-5):
        ours, theirs = runs.weights(one), runs.weights(two)
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, atol=within, rtol=0, msg=name)
        for mine, its in zip(runs.lines(one), runs.lines(two), strict=True):
            assert mine == pytest.approx(its, abs=10 * within, rel=10 * within)

    return compare


@pytest.fixture(scope="session")
def bars(tmp_path_factory):
    """Bars in an image of 4 x 4 pixels, and videos of them as they move; no row's grey is another's."""
    folder = tmp_path_factory.mktemp("bars")

    def bar(row, column):
        image = PILImage.new("L", (4, 4))
        image.paste(255 - row, (column % 4, 0, column % 4 + 1, 4))
        return image

    rows = [
        {"image": bar(i, i), "frames": [bar(i, i + t) for t in range(3)], "caption": "abcd"[i % 4]}
        for i in range(16)
    ]
    features = Features(image=Image(), frames=List(Image()), caption=Value("string"))
    Dataset.from_list(rows, features=features).to_parquet(folder / "bars.parquet")
    return folder / "bars.parquet"


@pytest.fixture(scope="session")
def adversarial():
    """Six steps of two images, with metrics only where `data.label` says so."""
    return Toy("adversarial", ADVERSARIAL)


@pytest.fixture(scope="session")
def pretrain(bars):
    """Four steps of eight documents of bars."""
    return Toy("pretrain", PRETRAIN | {"data.paths": f"[{bars}]"})


@pytest.fixture(scope="session")
def head_flags():
    """A function: an image head -> the flags of a run with it."""
    return for_head


@pytest.fixture(params=["adversarial", "pretrain"])
def script(request, adversarial, pretrain):
    """Each of the two scripts; the second with an adversarial head."""
    if request.param == "adversarial":
        return adversarial
    return Toy("pretrain", pretrain.settings | {"image_head": "adversarial"})


@pytest.fixture
def refusal(capsys):
    """A function: a toy and changes -> the one sentence, of exit code 2, that refuses them."""

    def refuse(toy, output_dir, **changes):
        capsys.readouterr()
        assert toy.run(output_dir, **changes) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return refuse
