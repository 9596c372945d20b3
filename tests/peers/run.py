"""Run transformers' own test mixins, of the version installed here, against RopeMM: `make peer-tests`.

They are in transformers' source archive alone, which pip brings into build/peers; nothing of it is kept here.
What the mixins import and the archive leaves out is stood in for by empty modules.
"""

import os
import shlex
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEERS = ROOT / "build" / "peers"

# modules that the mixins import and the archive lacks, and the little that must be in them
MISSING = {
    "__init__": "",
    "exporters/__init__": "",
    "exporters/test_export": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__": "",
    "generation/test_utils": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__": "",
    "utils/test_configuration_utils": "config_common_kwargs = {}\n",
    "../fetch_hub_objects_for_ci": "def url_to_local_path(url):\n    return url\n",
}


def pip(*words: str) -> None:
    """Call pip, or end with what it said."""
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], check=False)
    if done.returncode:
        sys.exit(f"pip {' '.join(words)} failed; the peers' tests need the package index once")


def fetch() -> Path:
    """The folder that holds the archive's `tests`, downloaded if it is not there."""
    name = f"transformers-{version('transformers')}"
    folder = PEERS / name
    if not (folder / "complete").exists():
        PEERS.mkdir(parents=True, exist_ok=True)
        wanted = name.replace("-", "==", 1)
        pip("download", wanted, "--no-binary", "transformers", "--no-deps", "--dest", str(PEERS))
        with tarfile.open(PEERS / f"{name}.tar.gz") as archive:
            members = [m for m in archive.getmembers() if m.name.startswith(f"{name}/tests/")]
            archive.extractall(PEERS, members, filter="data")
        for module, code in MISSING.items():
            path = folder / "tests" / f"{module}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code, encoding="utf-8")
        pip("install", "--no-deps", "--target", str(folder), "parameterized")
        (folder / "complete").touch()
    return folder


class Table:
    """What became of each test, and why."""

    def __init__(self):
        self.outcomes: dict[str, str] = {}
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome; an error outside a test's body counts as a failure."""
        if report.when == "call" or not report.passed:
            worse = self.outcomes.get(report.nodeid) == "failed"
            self.outcomes[report.nodeid] = "failed" if worse else report.outcome
        if report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons[reason.removeprefix("Skipped: ").splitlines()[0]] += 1

    def __str__(self) -> str:
        rows: dict[str, Counter[str]] = {}
        for test, outcome in self.outcomes.items():
            rows.setdefault(test.split("::")[1], Counter())[outcome] += 1
        lines = ["| transformers' | passed | failed | skipped |", "| --- | --- | --- | --- |"]
        names = "passed", "failed", "skipped"
        lines += [f"| {name} | {' | '.join(str(row[n]) for n in names)} |" for name, row in rows.items()]
        lines += ["", "skipped because:"]
        return "\n".join(lines + [f"{count:4} {reason}" for reason, count in self.reasons.most_common()])


def main(words: list[str]) -> int:
    """Fetch, run, print the table; the number of failures is the exit status."""
    folder = fetch()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    path = shlex.join(map(str, (folder, ROOT, ROOT / "kernels")))
    table = Table()
    quiet = ["-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(HERE)]
    quiet += ["-o", f"pythonpath={path}"]
    status = pytest.main([str(HERE / "suite.py"), "-c", os.devnull, *quiet, *words], plugins=[table])
    print(table)
    return min(list(table.outcomes.values()).count("failed"), 99) or int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
