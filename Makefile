# kvutils: `make help` lists what there is to do.
PYTHON      ?= python3
VENV        ?= .venv
PROFILE     ?= pocket
MODEL       ?= $(if $(filter paper,$(PROFILE)),llava-onevision-7b,pocket)
# Not from the environment, where they mean other things.
SIZE         = full
SEED         = 1
SEEDS        = 2,3,4
ARMS         =
STEPS        =
DATA         = files
GPU          =
JOBS         =
NOTEBOOKS   ?=
DATASETS    ?=
ARGS        ?=
TORCH_INDEX ?=
KEEP_TORCH  ?=

RUN   := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CHECK := $(CURDIR)/data/cache/check
# A text as one word of the shell, whatever is in it: $(call quoted,$(MODEL)).
quoted = '$(subst ','\'',$(1))'
PAPER_MODEL = $(if $(subst xpocketx,,x$(MODEL)x),$(MODEL),llava-onevision-7b)
HOW    = --size $(call quoted,$(SIZE)) --data $(call quoted,$(DATA))
ATONCE = $(if $(JOBS),--jobs $(call quoted,$(JOBS)))
CHOSEN = $(if $(NOTEBOOKS),--notebooks $(NOTEBOOKS))
FILES  = $(if $(NOTEBOOKS),$(foreach n,$(NOTEBOOKS),$(wildcard notebooks/$(n)*.ipynb)),notebooks)

# Notebooks run in their own folder: one that is given relative to this one, or to home, is made absolute.
ABSOLUTE = import os, sys; print(os.path.abspath(os.path.expanduser(sys.argv[1])))
$(foreach name,KVUTILS_DATA KVUTILS_OUT KVUTILS_CACHE KVUTILS_SAMPLES HF_HOME,$(if $($(name)),$(eval override export $(name) := \
  $(or $(shell $(PYTHON) -c '$(ABSOLUTE)' $(call quoted,$($(name)))),$($(name))))))

.DEFAULT_GOAL := help
.PHONY: help install replicate test test-code test-notebooks test-browser lab figures report check site bench bench-peers data train organisms clean distclean plan rehearse

help:  ## list every target with a line each
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  DATASETS="davis-2017 pope"  KVUTILS_DATA=FOLDER   for make data: what to fetch, and where to'
	@echo '  PROFILE=pocket|paper  MODEL=pocket|pocket-qwen|llava-onevision-7b|...  NOTEBOOKS="01 03"  ARGS="-p seed 1"'
	@echo '  SIZE=full|quick           quick: a sample of the data, the same measurements, results apart'
	@echo '  DATA=files|hub            paper profile: data sets below KVUTILS_DATA, or the copies on the hub alone'
	@echo '  GPU=h100|a100|t4|...      make plan: hours on this GPU (default: the one here, else h100)'
	@echo '  JOBS=N                    make replicate: notebooks at a time (default: pocket on a CPU, as many as cores)'
	@echo '  PYTHON=python3.12         the interpreter from which $(VENV) is made (3.11.4 or newer)'
	@echo '  TORCH_INDEX=URL           an index to take torch from, such as https://download.pytorch.org/whl/cpu'
	@echo '  KEEP_TORCH=1              use the torch that is installed already (a GPU machine'"'"'s own)'

install: $(STAMP)  ## make .venv and install into it (the other targets do it when needed)

# Made again only when what is to be installed has changed. A half-made environment is completed.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || { echo; \
	  echo 'kvutils needs Python 3.11.4 or newer, but "$(PYTHON)" is missing or older.'; \
	  echo 'Name another one:  make PYTHON=python3.12 $(MAKECMDGOALS)'; exit 1; } >&2
	@echo 'Installing into $(VENV) (once; a few minutes, most of it the download of torch) ...'
	@$(PYTHON) -m venv $(if $(KEEP_TORCH),--system-site-packages) $(VENV) || { echo; \
	  echo '"$(PYTHON) -m venv $(VENV)" failed, see above.'; \
	  echo 'On Debian and Ubuntu the package python3-venv may be missing. If $(VENV) holds something'; \
	  echo 'broken, remove it with "make distclean" and try again.'; exit 1; } >&2
	@quiet=$$(test -t 1 || echo -q); { $(if $(KEEP_TORCH),$(RUN) -m pip install $$quiet -e '.[dev]',$(RUN) -m pip install $$quiet \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.txt && \
	  $(RUN) -m pip install -q --no-deps --no-build-isolation -e .); } || { echo; \
	  echo 'The installation failed, see above. It needs a package index (network) and about'; \
	  echo '2 GB of disk, or 8 GB where torch comes with CUDA. Run the same command to go on.'; exit 1; } >&2
	@touch $@

replicate: $(STAMP)  ## run the notebooks, write results, figures and the verdict table
	@$(RUN) -m kvutils replicate --profile $(call quoted,$(PROFILE)) --model $(call quoted,$(MODEL)) $(HOW) $(CHOSEN) $(ATONCE) $(ARGS)

test: test-code test-notebooks  ## all tests: the code, then every notebook

# A process of one thread for each core, at most four (2 GB of memory each); who is done takes over from the others.
test-code: $(STAMP)  ## the tests of the code alone (ARGS="-k keys")
	@$(RUN) -m pytest tests -p no:nbval -n logical --maxprocesses 4 --dist worksteal $(ARGS)

# papermill executes each notebook and compares its verdicts and their numbers with the committed ones; nbval then compares the
# marked outputs, reading the parts that the first execution has stored, a notebook per process. Both write results and
# figures into data/cache/check, not over the committed ones.
test-notebooks: $(STAMP)  ## execute the notebooks with papermill, compare verdicts and outputs (nbval)
	@KVUTILS_OUT='$(CHECK)' $(RUN) -m kvutils replicate --check $(CHOSEN) $(ATONCE)
	@KVUTILS_OUT='$(CHECK)' MPLBACKEND=module://matplotlib_inline.backend_inline OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  $(RUN) -m pytest -n $(or $(JOBS),logical) --maxprocesses 6 --dist loadfile --nbval-lax --nbval-sanitize-with notebooks/nbval.cfg --nbval-current-env --nbval-cell-timeout=1800 $(FILES)

# With the first of $KVUTILS_CHROMIUM, chromium, chromium-browser and google-chrome; ARGS="tests/browser/test_view.py" leaves
# JupyterLab out. What was measured and where the screenshots lie stands at the end.
test-browser: $(STAMP)  ## the explorer in Chromium: its page alone, then in JupyterLab with the pocket model
	@KVUTILS_BROWSER=1 $(RUN) -m pytest $(or $(ARGS),tests/browser)

plan: $(STAMP)  ## what the paper profile needs and what of it is there: data, GB, GPU memory, hours
	@$(RUN) -m kvutils plan --model $(call quoted,$(PAPER_MODEL)) $(HOW) $(if $(GPU),--gpu $(call quoted,$(GPU))) $(CHOSEN)

rehearse: $(STAMP)  ## run a published architecture with random weights: memory, seconds, hours (no data)
	@$(RUN) benchmarks rehearse --model $(call quoted,$(PAPER_MODEL)) $(ARGS)

lab: $(STAMP)  ## open the notebooks in JupyterLab; on a remote machine ARGS="--no-browser --port 8888"
	@OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(RUN) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb $(ARGS)

figures: $(STAMP)  ## redraw every figure from the stored results (seconds, no model)
	@$(RUN) -m kvutils figures --profile $(call quoted,$(PROFILE)) --model $(call quoted,$(MODEL)) --size $(call quoted,$(SIZE))
	@$(if $(filter pocket,$(MODEL)),$(RUN) benchmarks organisms --figures '$(or $(KVUTILS_OUT),.)/figures')

report: $(STAMP)  ## write the verdicts into data/results and README.md
	@$(RUN) -m kvutils report

check: $(STAMP)  ## compute all results again from what runs left per item (ARGS=FOLDER: of one run)
	@$(RUN) -m kvutils check $(ARGS)

site: $(STAMP)  ## build the static site into build/site: notebooks, verdicts, API pages, an explorer without a kernel
	@$(RUN) .ci/site.py $(ARGS)

bench: $(STAMP)  ## measure speed and memory, write benchmarks/results.json
	@$(RUN) benchmarks bench $(ARGS)

bench-peers: $(STAMP)  ## measure beside nnsight, nnterp and transformers alone (installed apart, into .venv-peers)
	@$(RUN) benchmarks peers $(ARGS)

# Below KVUTILS_DATA, taken from the environment or given to make.
data: $(STAMP)  ## fetch real data sets: DATASETS="davis-2017 pope" (without: list them)
	@$(RUN) -m kvutils data $(DATASETS) $(ARGS)

# With ARGS, such as "--stage text", it only trains.
train: $(STAMP)  ## train a pocket model from nothing and write it to data/pocket: MODEL=pocket-qwen, SEED=2 (90 minutes on 2 cores; resumes)
	@$(RUN) benchmarks train --model $(call quoted,$(MODEL)) --seed $(call quoted,$(SEED)) $(ARGS)
	@$(if $(ARGS),,$(RUN) benchmarks export --model $(call quoted,$(MODEL)) --seed $(call quoted,$(SEED)))

# Arms begin with the shipped weights of pocket. STEPS=40 tries it (in data/training/trials); ARGS="--status" says how far it is, "--rates" compares candidates for
# the rate of AdamW.
organisms: $(STAMP)  ## train and measure the arms of notebook 06: ARMS="base narrow-0.9", SEEDS=2,3,4 (resumes)
	@$(RUN) benchmarks organisms --seeds $(call quoted,$(SEEDS)) $(if $(ARMS),--arms $(ARMS)) $(if $(STEPS),--steps $(call quoted,$(STEPS))) $(ARGS)

clean:  ## remove stored parts and bytecode (results and training checkpoints stay)
	rm -rf data/cache .pytest_cache build
	find kvutils tests benchmarks notebooks data/pocket -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

distclean: clean  ## clean, and remove .venv and .venv-peers
	rm -rf '$(VENV)' .venv-peers
