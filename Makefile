# On a machine with Python >= 3.11 and nothing else, `make test` is all there is to type.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install train pretrain test test-slow test-long test-colabs test-reference test-tpu test-oldest lint docs docs-links bench clean

install: .venv/test

.venv/test: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python >= 3.11 is needed"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the package and what its tests need in .venv. This takes some minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,test]'
	touch $@

.venv/reference: .venv/test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,test,reference]'
	touch $@

.venv/tpu: .venv/test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,test,tpu]'
	touch $@

# The tests that would notice that a version is too old.
OLDEST_TESTS := tests/sam_jax/model/test_sam.py tests/sam_jax/weights/test_vit.py \
	tests/sam_jax/predict/test_predictor.py tests/sam_jax/everything/test_generator.py \
	tests/train/test_checkpoints.py \
	tests/train/test_run.py::test_a_run_resumes_from_the_checkpoint_before_a_damaged_one

.venv-oldest/test: setup.cfg pyproject.toml tests/oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		-c tests/oldest.txt -e '.[train,test]'
	touch $@

.venv/docs: .venv/test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,test,docs]'
	touch $@

train: .venv/test
	$(BIN)/python -m train configs/sam_tiny.py --workdir runs/sam_tiny

pretrain: .venv/test
	$(BIN)/python -m train configs/mae_tiny.py --workdir runs/mae_tiny

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		-m 'not slow and not long and not reference and not colab and not tpu'

test-slow: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

test-long: .venv/test
	$(BIN)/python -m pytest -m long

test-colabs: .venv/test
	$(BIN)/python -m pytest -m colab

test-reference: .venv/reference
	$(BIN)/python -m pytest -m reference

test-tpu: .venv/tpu
	$(BIN)/python -m pytest -m tpu

test-oldest: .venv-oldest/test
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile \
		-m 'not slow and not long and not reference and not colab and not tpu' $(OLDEST_TESTS)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

docs: .venv/docs
	$(BIN)/python -m sphinx -W --keep-going --quiet docs docs/_build/html

docs-links: .venv/docs
	$(BIN)/python -m sphinx --quiet -b linkcheck docs docs/_build/links

bench: .venv/reference
	$(BIN)/python -m tests.benchmarks.predict
	$(BIN)/python -m tests.benchmarks.train
	$(BIN)/python -m tests.benchmarks.loader
	$(BIN)/python -m tests.benchmarks.everything

clean:
	rm -rf .venv .venv-oldest build dist docs/_build docs/commands *.egg-info
