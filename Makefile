# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint format kernels-asan clean

# The model, the text and the results stay in the cache folder (ONNXQ_CACHE, see tools/models.py).
demo: $(VENV)/.demo
	$(RUN) -m samples.embedding.demo

# One process a core, each with whole files: their models are made once.
test: $(VENV)/.test
	$(RUN) -m pytest --numprocesses auto --dist loadfile $(TESTS)

lint: $(VENV)/.lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'custom_ops/*.h' 'custom_ops/*.cpp')

format: $(VENV)/.lint
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'custom_ops/*.h' 'custom_ops/*.cpp')

# The kernels and op adapters under AddressSanitizer and UndefinedBehaviorSanitizer.
kernels-asan:
	cmake -S custom_ops -B build/asan -DONNXQ_SANITIZE=ON -DONNXQ_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/asan --parallel
	ctest --test-dir build/asan --output-on-failure

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

SOURCES = pyproject.toml constraints.txt $(shell git ls-files custom_ops)

# Editable, so that tests and demo see the sources as they are; the kernel library is compiled once.
$(VENV)/.demo: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) --editable '.[export]'
	touch $@

$(VENV)/.test: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) --editable '.[export,test]'
	touch $@ $(VENV)/.demo

$(VENV)/.lint: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build
