# make train   a small Kimi K2 on this machine's CPU: environment, real text, training, picture, sample
# make test    the whole test suite
# Both need Python (3.11 or 3.12) and nothing else; PYTHON=python3.12 chooses one.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin
STDLIB = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')

.PHONY: train test test-fast test-interop test-tpu env data clean

env: $(VENV)/ready

$(VENV)/ready: setup.cfg pyproject.toml constraints-$(VERSION).txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-$(VERSION).txt -e '.[test]'
	touch $@

constraints-%.txt:
	@echo "k2jax is tested on Python 3.11 and 3.12, this is $*; give PYTHON=python3.11 or python3.12"; exit 1

data: data/stdlib

data/stdlib: | $(VENV)/ready
	$(BIN)/k2jax prepare $(STDLIB) --pattern '**/*.py' --exclude 'site-packages/**' --exclude 'dist-packages/**' \
		--tokenizer byte --out data/stdlib

# The same seed without QK-Clip, to see what the clip does; runs/tiny itself resumes if it was stopped.
train: env data/stdlib
	$(BIN)/k2jax train configs/tiny.py --simulate 1
	$(BIN)/k2jax train configs/tiny.py --simulate 1 --train.run-dir runs/tiny-no-clip --optim.qk-clip-tau none \
		--train.num-steps 110
	$(BIN)/python benchmarks/quickstart.py runs/tiny runs/tiny-no-clip

test: env
	$(BIN)/python -m pytest

# What every change must pass on the other Python: all but the tests that train in processes of their own.
test-fast: env
	$(BIN)/python -m pytest -m 'not slow and not interop and not tpu'

# Against the libraries that read what k2jax exports: transformers, mlx-lm, lm-eval. Installs PyTorch.
test-interop: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-$(VERSION).txt -e '.[test,interop]'
	$(BIN)/python -m pytest -m interop tests/interop

# The optimizer at Kimi K2's size, compiled for 1,024 and 4,096 TPU v5p without having one: minutes, and 3 GiB of memory.
# libtpu makes every later start of JAX look for a TPU; `make clean` or pip uninstall removes it.
test-tpu: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-$(VERSION).txt -e '.[test,tpu-compiler]'
	$(BIN)/python -m pytest -m tpu tests/optim

clean:
	rm -rf .venv-* data runs build
