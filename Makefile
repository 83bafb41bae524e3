# `make` alone lists what there is. Needs Python 3.10-3.12, make, and 5 GB of disk for the packages.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.lock
UV_VERSION := 0.13.9

# More threads than this only slow the demo's and the tests' small models down.
OMP_NUM_THREADS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); \
	[ "$$n" -gt 4 ] && n=4; echo "$$n")
export OMP_NUM_THREADS

.DEFAULT_GOAL := help
.PHONY: help demo test lint lock install clean-demo
.NOTPARALLEL:
.SECONDARY:
.DELETE_ON_ERROR:

help:
	@echo "make demo        install, train the three stages on bundled speech, write demo/index.html"
	@echo "make test        install, run the tests"
	@echo "make lint        install, check style and formatting"
	@echo "make install     only create $(VENV) and install requirements.lock into it"
	@echo "make lock        resolve requirements.lock anew from pyproject.toml"
	@echo "make clean-demo  remove demo/ (tokens, runs, samples and the page)"
	@echo
	@echo "PYTHON=python3.12 picks the interpreter, VENV=path another virtual environment."

# ---- install ------------------------------------------------------------------------------------
# $(STAMP) is a copy of the lock, written last: an interrupted install has none and starts afresh
# (downloads are cached), an unchanged lock with a newer date (a checkout) installs nothing.

PYTHON_OK = import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))

define FIND_PYTHON
for python in $(or $(PYTHON),python3 python3.12 python3.11 python3.10); do \
	if "$$python" -c "$(PYTHON_OK)" >/dev/null 2>&1; then break; fi; python=; \
done; \
if [ -z "$$python" ]; then \
	echo "error: no usable Python 3.10, 3.11 or 3.12 (tried: $(or $(PYTHON),python3 python3.12 \
	python3.11 python3.10)). Install one with its venv module, or name it:" \
	"make PYTHON=/path/to/python3.12" >&2; exit 2; \
fi
endef

install: $(STAMP)

$(STAMP): requirements.lock
	@if cmp -s requirements.lock $@; then touch $@; exit 0; fi; \
	set -e; \
	if [ ! -f $@ ]; then \
		$(FIND_PYTHON); \
		if [ -e "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ] && [ -n "$$(ls -A "$(VENV)")" ]; then \
			echo "error: $(VENV) is not a virtual environment; choose another VENV" >&2; exit 2; \
		fi; \
		echo "Creating $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv --clear "$(VENV)"; \
	fi; \
	rm -f $@; \
	echo "Installing requirements.lock: 3 GB to download, 5 GB on disk, a few minutes."; \
	echo "The last step, 'Installing collected packages', says nothing for a minute or two."; \
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock; \
	echo "Checking the installation"; \
	$(BIN)/python -c "import torch, torchaudio, encodec, soundfile"; \
	cp requirements.lock $@

lock:
	@set -e; $(FIND_PYTHON); tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; \
	"$$python" -m venv "$$tools"; \
	"$$tools/bin/python" -m pip install -q --disable-pip-version-check uv==$(UV_VERSION); \
	"$$tools/bin/uv" pip compile pyproject.toml --extra dev -o requirements.lock --upgrade -q \
		--universal --python-version 3.10 --fork-strategy fewest --generate-hashes \
		--no-annotate --custom-compile-command "make lock"; \
	grep -c '==' requirements.lock | sed 's/$$/ packages in requirements.lock/'

# ---- checks -------------------------------------------------------------------------------------

test: $(STAMP)
	$(BIN)/python -m pytest -rs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# ---- demo ---------------------------------------------------------------------------------------
# Every step is resumable, so an interrupted `make demo` goes on where it stopped.

STAGES := semantic coarse fine
RUNS := $(STAGES:%=demo/runs/%)
TRAINED := $(RUNS:=/.finished)
SAMPLE := $(BIN)/python -m scripts.sample $(foreach stage,$(STAGES),--$(stage) demo/runs/$(stage))
PROMPT := data/demo/audio/vm-newuser.opus

demo: demo/index.html
	@echo "Open $(CURDIR)/demo/index.html"

# MFCC tokens: 18 s on two cores, with the default ones 24 s
demo/tokens/header.json: data/demo/manifest.jsonl | $(STAMP)
	$(BIN)/python -m scripts.prepare --audio $< --semantic pretrained/semantic_mfcc --out demo/tokens
	@touch $@

demo/runs/%/.finished: configs/demo_%.yaml demo/tokens/header.json | $(STAMP)
	$(BIN)/python train.py --config $< --resume
	@touch $@

demo/samples/unprompted.json: $(TRAINED)
	$(SAMPLE) --num 2 --seconds 4 --seed 0 --out demo/samples/unprompted.wav

demo/samples/continuation.json: $(TRAINED) $(PROMPT)
	$(SAMPLE) --prompt $(PROMPT) --prompt-seconds 3 --num 2 --seconds 5 --seed 0 \
		--out demo/samples/continuation.wav

demo/index.html: demo/samples/unprompted.json demo/samples/continuation.json \
		scripts/report.py scripts/figures.py scripts/report.html
	$(BIN)/python -m scripts.report $(RUNS) --samples demo/samples --out $@

clean-demo:
	rm -rf demo
