# make quickstart: the first real run.  make check: does it work here, in a minute.  make test: everything that must hold.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: bench check clean format lint peft-suite quickstart setup test test-avx2 wheel zoo zoo-page
.DELETE_ON_ERROR:

setup: $(VENV)/ready

# What runs loraloom. torch first and pinned: an open range may pull gigabytes of CUDA packages onto a machine without a GPU.
$(VENV)/runs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[demo]'
	touch $@

# And what tests, checks and compares it.
$(VENV)/ready: $(VENV)/runs
	$(PIP) --editable '.[dev,demo,ray]'
	touch $@

quickstart: $(VENV)/runs
	$(BIN)/python examples/quickstart.py

check: $(VENV)/runs
	$(BIN)/python tests/smoke.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

# The maths, layers, packs and a search's decisions as a processor without AVX-512 computes them; and the tests for a GPU.
NUMBERS := $(addprefix tests/lora/test_, functional.py matmul.py dropout.py layers.py shared_inputs.py biases.py merge.py routing.py) \
  $(addprefix tests/engine/test_, pack.py flat_adamw.py optimizers.py loop.py slot.py) \
  $(addprefix tests/tasks/test_, linear_cross_entropy.py objective.py) tests/models/test_activation_checkpointing.py \
  tests/inference/test_evaluation.py tests/tasks/metrics/test_registry.py $(addprefix tests/tuning/test_, asha.py verdict.py) \
  tests/tuning/test_search.py::test_a_trial_gone_wild_is_reported_and_changes_no_bit_of_the_others tests/gpu

test-avx2: setup
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 LORALOOM_TEST_DEVICE=cpu OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n 2 -q -k "not compile" $(NUMBERS)

# ZOO=llama,bert: some model types; ZOO=3/8: an eighth of them; without it all, in about an hour.
zoo: setup
	PYTHONPATH=tests $(BIN)/python -m zoo $(ZOO)

# The whole, its table and docs/models.md. Stopped, the same command resumes.
zoo-page: setup
	PYTHONPATH=tests $(BIN)/python -m zoo --write

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# dist/: a wheel and the sources; the wheel is installed into a fresh environment and tried there.
wheel: $(VENV)/runs
	rm -rf dist build/wheel
	$(PIP) build
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && wheel/bin/loraloom --version && wheel/bin/python ../tests/smoke.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	for name in lifecycle step breakdown memory loss attention half end_to_end pack sweep data; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# PEFT's own LoRA tests on loraloom. PEFT_SOURCE=a checkout of PEFT; PEFT_SUITE="tests/test_custom_models.py -k Mixed" for
# a part. What fails as it is meant to is in tests/peft_suite/differences.py.
PEFT_SUITE ?= $(addprefix tests/test_,$(addsuffix .py,custom_models config initialization low_level_api tuners_utils \
	other helpers lora_variants lora_conversion target_parameters mixed integrations mapping arrow loraplus hub_features \
	auto decoder_models encoder_decoder_models feature_extraction_models seq_classifier))
peft-suite: setup
ifeq ($(PEFT_SOURCE),)
	@echo "peft-suite: skipped; set PEFT_SOURCE to a checkout of https://github.com/huggingface/peft"
else
	$(BIN)/python -m pip install --quiet --no-deps parameterized
	cd $(PEFT_SOURCE) && PYTHONPATH=$(CURDIR)/tests:$(CURDIR)/src HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
		$(abspath $(BIN))/python -m pytest -q -o addopts= -p no:cacheprovider -p peft_suite.plugin -W ignore --tb=line $(PEFT_SUITE)
endif

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
