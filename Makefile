# Every target makes .venv if it is missing or older than what it is made from.
# On Linux without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu keeps torch small.
PYTHON ?= python3
py := .venv/bin/python
# the models here are small: more threads wait longer than they work
export OMP_NUM_THREADS ?= 2

.PHONY: venv train test bench bench-gan check docs peer-tests

venv: .venv/installed

# timm asks for torchvision, which its rotary does not; it lies where only tests/conformance looks, as the
# `accelerate` command imports any timm that it finds
.venv/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(py) -m pip install --quiet -c constraints.txt -e ".[test,triton,conformance]"
	$(py) -m pip uninstall --quiet --quiet --yes timm  # of an environment that was made before
	$(py) -m pip install --quiet -c constraints.txt --no-deps --upgrade --target .venv/peers timm
	touch $@

train: .venv/installed
	$(py) train/adversarial.py --config configs/adversarial/digits.yaml

test: .venv/installed
	$(py) -m pytest -m "not gpu"

bench: .venv/installed
	PYTHONPATH=.:kernels $(py) kernels/bench/cpu.py
	PYTHONPATH=.:kernels $(py) kernels/bench/aot.py --quick
	PYTHONPATH=.:kernels:kernels/bench $(py) train/bench.py --quick

bench-gan: .venv/installed
	$(py) train/compare_losses.py --config configs/adversarial/stacked-digits.yaml --out runs/losses

check: .venv/installed
	$(py) -m ruff format --check .
	$(py) -m ruff check .
	$(py) -m pyright
	.venv/bin/lint-imports

# mkdocs finds dead links, anchors and pages (never with -q, which hides what --strict counts); Zensical, its successor,
# builds the same pages
docs: .venv/installed
	$(py) -m pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	.venv/bin/zensical build --strict

# transformers' own test mixins against RopeMM; pip brings them into build/peers the first time
peer-tests: .venv/installed
	$(py) tests/peers/run.py
