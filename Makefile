# make train   a small Kimi K2 on this machine's CPU: environment, real text, training, picture, sample
# make test    the whole test suite
# Both need Python (3.11 or 3.12) and nothing else; PYTHON=python3.12 chooses one.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin
STDLIB = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')

# XLA on a CPU takes its temporary memory anew each step; in pages of 2 MiB that is a tenth of the step faster.
train bench: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

.PHONY: train test test-fast test-grid test-hosts test-interop test-tpu test-gpu test-kernels test-data chaos env data comparators bench clean

env: $(VENV)/ready

$(VENV)/ready: setup.cfg pyproject.toml constraints-$(VERSION).txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-$(VERSION).txt -e '.[test]'
	touch $@

constraints-%.txt:
	@echo "k2jax is tested on Python 3.11 and 3.12, this is $*; give PYTHON=python3.11 or python3.12"; exit 1

data: data/stdlib

data/stdlib: | $(VENV)/ready
	$(BIN)/k2jax prepare $(STDLIB) --pattern '**/*.py' --exclude '**/{site,dist}-packages/**' \
		--exclude '**/{test,tests,idle_test}/**' --exclude '{encodings,pydoc_data}/**' \
		--tokenizer train:2048 --validation-fraction 0.05 --out data/stdlib

# The same seed without QK-Clip, to see what the clip does; runs/tiny itself resumes if it was stopped.
train: env data/stdlib
	$(BIN)/k2jax train configs/tiny.py --simulate 1
	$(BIN)/k2jax train configs/tiny.py --simulate 1 --train.run-dir runs/tiny-no-clip --optim.qk-clip-tau none \
		--train.num-steps 110
	$(BIN)/python benchmarks/quickstart.py runs/tiny runs/tiny-no-clip

# Two processes: most of the time is compiling, which XLA does in one thread.
test: env
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Every cell of the grids of which `make test` has a few; half an hour.
test-grid: env
	$(BIN)/python -m pytest -n 2 --dist worksteal -m grid

# Real processes on this machine, up to sixteen: equal bits on every mesh, other counts, signals, buckets; an hour.
test-hosts: env
	$(BIN)/python -m pytest -m 'slow or grid' tests/test_processes.py tests/train/test_many_processes.py tests/train/test_bucket_runs.py tests/sharding/test_gloo.py tests/launch tests/cli/test_launch_training.py

# The fault scoreboard: killed, frozen, hung and full, thirty runs that must end in the same bits; half an hour.
chaos: env
	$(BIN)/python benchmarks/chaos.py

# What every change must pass on the other Python: all but the tests that train in processes of their own.
test-fast: env
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not grid and not interop and not tpu and not kernels and not data and not gpu'

# Against the libraries that read what k2jax exports: transformers, mlx-lm, lm-eval. Installs PyTorch.
test-interop: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-$(VERSION).txt -e '.[test,interop]'
	$(BIN)/python -m pytest -m interop tests/interop

# The optimizer at Kimi K2's size, compiled for 1,024 and 4,096 TPU v5p without having one: minutes, and 3 GiB of memory.
# libtpu makes every later start of JAX look for a TPU; `make clean` or pip uninstall removes it.
test-tpu: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-$(VERSION).txt \
		-e '.[test,kernels,tpu-compiler]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps tokamax==0.0.12
	$(BIN)/python -m pytest -m tpu tests/optim tests/sharding tests/plan

# Steps compiled for H100 without having one, in an environment of its own: a CUDA plugin makes JAX look for a GPU.
test-gpu:
	test -d .venv-gpu || $(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$(VERSION).txt -e '.[test,gpu-compiler]'
	.venv-gpu/bin/python -m pytest -m gpu tests/plan tests/sharding tests/kernels tests/model

# tokamax's kernels, interpreted and compiled for TPU v5p, in an environment of their own: docs/experts.md says why.
test-kernels:
	test -d .venv-kernels || $(PYTHON) -m venv .venv-kernels
	.venv-kernels/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$(VERSION).txt \
		-e '.[test,kernels,tpu-compiler]'
	.venv-kernels/bin/python -m pip install --quiet --disable-pip-version-check --no-deps tokamax==0.0.12
	.venv-kernels/bin/python -m pytest -m kernels tests/kernels

# What benchmarks/whole_step.py is compared with, in an environment of its own.
comparators: .venv-comparators/ready

.venv-comparators/ready: benchmarks/comparators/requirements.txt
	$(PYTHON) -m venv --clear .venv-comparators
	.venv-comparators/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	.venv-comparators/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchtitan==0.3.0
	touch $@

# Every benchmark that a CPU finishes in minutes, on an otherwise idle machine; the figures of README's table.
bench: env
	$(BIN)/python benchmarks/all.py

# Preparation on a Ray cluster of this machine alone. Installs Ray.
test-data: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-$(VERSION).txt -e '.[test,ray]'
	$(BIN)/python -m pytest -m data tests/data

clean:
	rm -rf .venv-* data runs build
