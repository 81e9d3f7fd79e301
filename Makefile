# Each target works as the only command after a clone: what it needs is set up first, in .venv.
# PYTHON=/path/to/python3.11 chooses the interpreter that .venv is made from.

PYTHON ?= python3.11
# Tests start Python some hundred times: without its cache, each start compiles the package anew (0.7 s).
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv
ZOO := .venv-zoo
INTEGRATIONS := .venv-integrations
DEEPSPEED := .venv-deepspeed
DEEPSPEED_VERSION := 0.19.8
BIN := $(VENV)/bin

SOURCES := $(wildcard csrc/*.c csrc/*.h)
# The stores that tests/servers runs against, and their clients: an environment of their own.
SERVERS := .venv-servers
AZURITE := 3.35.0

C_FILES := $(SOURCES) $(wildcard tests/native/*.c tests/native/*.h)

# Registries have bad moments: pip's own retries first, then the whole command twice more. Python compiles what is
# imported; pip would compile all of torch, which takes longer than the rest of the installation.
pip_install = for try in 1 2 3; do \
		$(if $(2),$(2),$(BIN))/python -m pip install --disable-pip-version-check --quiet --no-compile --retries 5 --timeout 60 $(1) \
			&& exit 0; \
		echo "pip failed (try $$try of 3)" >&2; sleep $$((try * 5)); \
	done; exit 1

.PHONY: setup environments engines demo gpu test test-long test-servers test-integrations zoo lint bench sanitize clean

setup: $(VENV)/engine.stamp

$(VENV)/requirements.stamp: requirements-dev.txt
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(call pip_install,-r requirements-dev.txt)
	@touch $@

$(VENV)/engine.stamp: $(VENV)/requirements.stamp pyproject.toml $(SOURCES)
	@echo "building ckptengine"
	@$(call pip_install,--no-build-isolation --no-deps --editable .)
	@touch $@

# What all targets install, before anything is built: make -j2 environments.
environments: $(VENV)/requirements.stamp $(ZOO)/requirements.stamp $(INTEGRATIONS)/requirements.stamp \
	$(DEEPSPEED)/requirements.stamp $(SERVERS)/azurite.stamp

# The package in all of them, one after the other: each lays its build of the C core into ckptengine/, where it is
# missing for a moment to tests that another target runs.
engines: $(VENV)/engine.stamp $(ZOO)/engine.stamp $(INTEGRATIONS)/engine.stamp $(DEEPSPEED)/engine.stamp

demo: setup
	$(BIN)/python examples/demo.py

# Test files are spread over TESTERS processes: make test TESTERS=8 on a larger machine.
TESTERS ?= 3

test: setup
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder --durations=30

# Whole trainings, most of them MindSpore's and under MPI, campaigns of kills and races, and all pairs of shardings.
test-long: setup
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder --durations=30 -m long

# Against real servers of the protocols: an S3 gateway, Google's, Azure's (on Node.js), SFTP.
test-servers: setup $(SERVERS)/requirements.stamp $(SERVERS)/azurite.stamp
	CKPTENGINE_TEST_SERVERS=1 PYTHONPATH=$(CURDIR) $(SERVERS)/bin/python -m pytest tests/servers $(ARGS)

$(SERVERS)/requirements.stamp: requirements-servers.txt
	@test -x $(SERVERS)/bin/python || { echo "making $(SERVERS) with $(PYTHON)"; $(PYTHON) -m venv $(SERVERS); }
	@echo "installing requirements-servers.txt into $(SERVERS)"
	@$(call pip_install,-r requirements-servers.txt,$(SERVERS)/bin)
	@touch $@

$(SERVERS)/azurite.stamp: $(SERVERS)/requirements.stamp
	@if command -v npm >/dev/null; then \
		echo "installing azurite $(AZURITE)"; \
		npm install --no-audit --no-fund --loglevel=error --prefix $(SERVERS)/azurite azurite@$(AZURITE); \
	else echo "npm is not here: Azure's protocol will not be tested" >&2; fi
	@touch $@

$(ZOO)/requirements.stamp: requirements-zoo.txt
	@test -x $(ZOO)/bin/python || { echo "making $(ZOO) with $(PYTHON)"; $(PYTHON) -m venv $(ZOO); }
	@echo "installing requirements-zoo.txt into $(ZOO)"
	@$(call pip_install,--no-deps -r requirements-zoo.txt,$(ZOO)/bin)
	@touch $@

$(ZOO)/engine.stamp: $(ZOO)/requirements.stamp pyproject.toml $(SOURCES)
	@echo "building ckptengine"
	@$(call pip_install,--no-build-isolation --no-deps --editable .,$(ZOO)/bin)
	@touch $@

# make zoo ARGS=--write writes docs/zoo.md anew: python tests/zoo/run.py --help names all.
zoo: $(ZOO)/engine.stamp
	$(ZOO)/bin/python tests/zoo/run.py $(ARGS)

# The trainers of ckptengine/integrations, each with the real package, killed and resumed.
test-integrations: $(INTEGRATIONS)/engine.stamp
	CKPTENGINE_TEST_INTEGRATIONS=1 $(INTEGRATIONS)/bin/python -m pytest -n 2 --dist loadfile --confcutdir=tests/integrations \
		tests/integrations $(ARGS)

$(INTEGRATIONS)/requirements.stamp: requirements-integrations.txt
	@test -x $(INTEGRATIONS)/bin/python || { echo "making $(INTEGRATIONS) with $(PYTHON)"; $(PYTHON) -m venv $(INTEGRATIONS); }
	@echo "installing requirements-integrations.txt into $(INTEGRATIONS)"
	@$(call pip_install,-r requirements-integrations.txt,$(INTEGRATIONS)/bin)
	@touch $@

$(INTEGRATIONS)/engine.stamp: $(INTEGRATIONS)/requirements.stamp pyproject.toml $(SOURCES)
	@echo "building ckptengine"
	@$(call pip_install,--no-build-isolation --no-deps --editable .,$(INTEGRATIONS)/bin)
	@touch $@

# DeepSpeed has an environment of its own: Accelerate and others change what they do where it is there.
test-deepspeed: $(DEEPSPEED)/engine.stamp
	CKPTENGINE_TEST_INTEGRATIONS=1 DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/python -m pytest --confcutdir=tests/integrations \
		tests/integrations/test_deepspeed.py $(ARGS)

$(DEEPSPEED)/requirements.stamp: requirements-deepspeed.txt
	@test -x $(DEEPSPEED)/bin/python || { echo "making $(DEEPSPEED) with $(PYTHON)"; $(PYTHON) -m venv $(DEEPSPEED); }
	@echo "installing requirements-deepspeed.txt and DeepSpeed $(DEEPSPEED_VERSION) into $(DEEPSPEED)"
	@$(call pip_install,-r requirements-deepspeed.txt,$(DEEPSPEED)/bin)
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu; export DS_BUILD_OPS DS_ACCELERATOR; \
		$(call pip_install,--no-build-isolation --no-deps deepspeed==$(DEEPSPEED_VERSION),$(DEEPSPEED)/bin)
	@touch $@

$(DEEPSPEED)/engine.stamp: $(DEEPSPEED)/requirements.stamp pyproject.toml $(SOURCES)
	@echo "building ckptengine"
	@$(call pip_install,--no-build-isolation --no-deps --editable .,$(DEEPSPEED)/bin)
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

# make bench ARGS="peers --runs 3 --only DCP": python -m benchmarks --help names all.
bench: setup
	$(BIN)/python -m benchmarks --json benchmarks.json $(ARGS)

# The tests and figures of an accelerator, with the Python that has torch for it: make gpu GPU_PYTHON=python3 (docs/gpu.md).
GPU_PYTHON ?= python3
gpu:
	PYTHON=$(GPU_PYTHON) bash tests/gpu/run.sh $(ARGS)

# The C core under the address, undefined-behaviour and thread sanitizers, on aarch64 and AVX-512 as emulated.
sanitize: setup
	$(BIN)/python -m pytest tests/native/test_core.py -m sanitize

clean:
	rm -rf $(VENV) $(ZOO) $(SERVERS) $(INTEGRATIONS) $(DEEPSPEED) build dist ckptengine.egg-info demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f ckptengine/_native.*.so benchmarks.json
	find ckptengine tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
