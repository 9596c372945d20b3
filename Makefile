# Every target makes .venv if it is missing or older than what it is made from.
# On Linux without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu keeps torch small.
PYTHON ?= python3
py := .venv/bin/python
# the models here are small: more threads wait longer than they work
export OMP_NUM_THREADS ?= 2

.PHONY: venv train test test-slow test-all test-newest test-lowest bench bench-gan check docs peer-tests

venv: .venv/installed

# timm asks for torchvision, which its rotary does not; it lies where only tests/conformance looks, as the
# `accelerate` command imports any timm that it finds
.venv/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(py) -m pip install --quiet -c constraints.txt -e ".[test,triton,conformance]"
	$(py) -m pip uninstall --quiet --quiet --yes timm  # of an environment that was made before
	$(py) -m pip install --quiet -c constraints.txt --no-deps --upgrade --target .venv/peers timm
	-$(flash_attn)
	touch $@

# one file of flash-attn, which needs Triton alone; the package wants CUDA. Without it a test of tests/conformance is skipped
flash_attn = FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE $(py) -m pip download --quiet --no-deps --no-build-isolation \
	--no-binary flash-attn --dest build flash-attn==2.8.3 && tar -xzf build/flash_attn-2.8.3.tar.gz -C .venv/peers \
	--strip-components 1 flash_attn-2.8.3/flash_attn/ops/triton/rotary.py

train: .venv/installed
	$(py) train/adversarial.py --config configs/adversarial/digits.yaml

# two workers of one thread each; what takes more than ten seconds is left to test-all
pytest := -m pytest -q -n 2 --dist worksteal
test: export OMP_NUM_THREADS = 1
test: .venv/installed
	$(py) $(pytest) -m "not gpu and not slow"

test-slow: export OMP_NUM_THREADS = 1
test-slow: .venv/installed
	$(py) $(pytest) -m "slow and not gpu"

test-all: test test-slow

# the versions of today, without constraints.txt, and the lowest direct ones of pyproject.toml; both on TORCH,
# as another one may cost gigabytes. Before a release, and where .ci/run is asked for them.
TORCH ?= torch==2.13.0
# what transformers 5.20.2 itself does otherwise: DeepSeek-V3 asks each rope for a factor, MiniMax-M3's tower has two
# axes, checkpointing has another name, GPT-J's and CodeGen's attention cannot be reached (they are refused), blocks of
# images do not move in packed rows of Gemma 3, and PaliGemma's prefixes mix (they are refused); LFM3 came later
not_at_lowest := not (deepseek_v3 or (three_axes and unchanged) or two_forwards_before_one_backward \
	or (trainer and checkpointing) or checkpointed_layers or GPTJ or CodeGen or lfm3 or hunyuan \
	or carries_a_state or (image_masks and (refuse or names)) or (paligemma and not older))
test-newest: export OMP_NUM_THREADS = 1
test-newest:
	$(PYTHON) -m venv --clear build/newest
	build/newest/bin/pip install --quiet $(TORCH)
	build/newest/bin/pip install --quiet --upgrade -e ".[test,triton,conformance]"
	build/newest/bin/python $(pytest) -m "not gpu and not slow"

test-lowest: export OMP_NUM_THREADS = 1
test-lowest:
	$(PYTHON) -m venv --clear build/lowest
	build/lowest/bin/pip install --quiet uv $(TORCH)
	echo $(TORCH) > build/torch.txt
	build/lowest/bin/uv pip compile --quiet pyproject.toml --extra test --resolution lowest-direct \
		--constraint build/torch.txt --no-emit-package torch --no-annotate --output-file build/lowest.txt
	grep -vE '^(nvidia|cuda|triton)' build/lowest.txt > build/lowest-cpu.txt
	build/lowest/bin/pip install --quiet $(TORCH) -r build/lowest-cpu.txt
	build/lowest/bin/pip install --quiet --no-deps -e .
	build/lowest/bin/python $(pytest) -m "not gpu and not slow" -k "$(not_at_lowest)" tests/checks tests/models tests/hf

bench: .venv/installed
	PYTHONPATH=.:kernels $(py) kernels/bench/cpu.py
	PYTHONPATH=.:kernels $(py) kernels/bench/cpu.py --threads 2
	PYTHONPATH=.:kernels $(py) kernels/bench/library.py
	PYTHONPATH=.:kernels $(py) kernels/bench/aot.py --quick
	PYTHONPATH=.:kernels:kernels/bench $(py) train/bench.py --quick

bench-gan: .venv/installed
	$(py) train/compare_losses.py --config configs/adversarial/stacked-digits.yaml --output_dir runs/losses

check: .venv/installed
	$(py) -m ruff format --check .
	$(py) -m ruff check .
	$(py) -m pyright
	.venv/bin/lint-imports

# first the pages of the gallery, half a minute, and the tutorials as notebooks; both folders are ignored.
# mkdocs finds dead links, anchors and pages (never with -q, which hides what --strict counts); Zensical, its successor,
# builds the same pages
docs: .venv/installed
	$(py) -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(py) gallery/scheme_pages.py docs/gallery
	$(py) gallery/notebooks.py docs/notebooks
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	.venv/bin/zensical build --strict

# transformers' own test mixins against RopeMM; pip brings them into build/peers the first time
peer-tests: .venv/installed
	$(py) tests/peers/run.py
