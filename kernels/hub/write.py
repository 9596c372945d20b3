"""The kernels as a project of Hugging Face's Kernel Hub, made of the code in this repository.

    python kernels/hub/write.py --out DIR --repo-id ORG/rope-mm-kernels

DIR, new or empty, gets what kernel-builder asks for (huggingface/kernels, docs/source/builder/
writing-kernels.md): build.toml, flake.nix, CARD.md, a test, and torch-ext/rope_mm_kernels, whose imports of
itself are relative, so that it can be imported under any name. Nothing is built or uploaded.
"""

import argparse
import ast
import re
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = "rope_mm_kernels"


def relative(text: str) -> str:
    """Python with the package's imports of itself made relative.

    Raises:
        ValueError: one that cannot be.
    """
    text = re.sub(rf"^(\s*from ){PACKAGE}\.(?=\S+ import)", r"\1.", text, flags=re.MULTILINE)
    text = re.sub(rf"^(\s*from ){PACKAGE}(?= import)", r"\1.", text, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] == PACKAGE:
                raise ValueError(f"the Kernel Hub wants relative imports; write `from {name} import ...`")
    return text


def project(repo_id: str) -> dict[str, str]:
    """Every file of the project, by its path."""
    code = [*sorted((HERE.parent / PACKAGE).glob("*.py")), HERE / "layers.py"]
    package = {path.name: relative(path.read_text(encoding="utf-8")) for path in code}
    package["__init__.py"] += '\nfrom . import layers\n\n__all__ += ["layers"]\n'
    here = {
        "LICENSE": HERE.parents[1] / "LICENSE",
        f"tests/test_{PACKAGE}.py": HERE / f"test_{PACKAGE}.py",
        **{name: HERE / name for name in ("build.toml", "flake.nix", "CARD.md")},
    }
    files = {
        name: path.read_text(encoding="utf-8").replace("REPO_ID", repo_id) for name, path in here.items()
    }
    return files | {f"torch-ext/{PACKAGE}/{name}": text for name, text in package.items()}


def write(out: Path, files: dict[str, str]) -> None:
    """The files, in a folder of their own.

    Raises:
        ValueError: a folder that holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files already; give a new folder, or empty it")
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Read the flags and write the project."""
    text = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**text)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repo-id", required=True, metavar="ORG/rope-mm-kernels", help="where it will live")
    flags = parser.parse_args()
    files = project(flags.repo_id)
    try:
        write(flags.out, files)
    except ValueError as error:
        parser.error(str(error))
    print(*(flags.out / name for name in files), sep="\n")
    if not find_spec("kernels"):
        print("The package kernels is not installed here, so get_local_kernel and kernelize were not tried.")


if __name__ == "__main__":
    main()
