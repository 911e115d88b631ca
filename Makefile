# Underdrawing: each target is a thin call of one command. `make` alone prints this help.
#
#   make demo                                  the main job on what ships with the project, in minutes, without a GPU
#   make preprocess DATA=~/pictures            encode images and captions once, into CACHE
#   make train                                 train a ControlNet from CACHE; nothing is encoded again
#   make train ADAPTER=lora                    a LoRA instead; ADAPTER=full: the base itself
#   make sweep DEPTHS="2-0 2-4 5-10" RATES="1e-5 2e-5"  many experiments from one cache, and a page that compares them
#   make compare RUNS="runs/a runs/b"          that page of any runs: curves, pictures, figures, what differs
#   make sample RUN=runs/depth-2-4 IMAGE=drawing.png PROMPT="..."
#   make sample RUN=runs/depth-2-4 PAIRS=pairs.jsonl   many at once, into a grid
#   make sample RUN=runs/lora-16 PROMPT="..."          with a LoRA or a whole base there is no drawing
#   make export RUN=runs/depth-2-4             the weights for others: diffusers, ComfyUI, a model card     (STEP=500)
#   make upload RUN=runs/depth-2-4 REPO=org/name       send that to the hub                                 (STEP=500)
#   make plan DEPTH=5-10 GPU=a100              what training will need: memory, time, disk; nothing is downloaded
#
#   make status                                what CACHE has, lacks and no longer needs, and why; loads no model
#   make inspect                               CACHE as one HTML page: totals, outliers, failures, every sample
#   make verify                                check every byte of CACHE
#   make repair                                encode again what is damaged in CACHE, and nothing else
#   make prune                                 name what nothing in CACHE refers to; with YES=1 remove it
#
#   make check-adherence                       can adherence be trusted? a control experiment that must fail (minutes)
#   make test                                  all tests (CPU, no network)
#   make lint                                  ruff and mypy
#   make torture                               kills, full disks, flipped bits: what comes of the cache (15 minutes)
#   make bench                                 the figures about the training step, on a GPU, 8 minutes at a time
#   make bench-cache                           the figures about the cache (10 minutes, 10 GB of disk)
#   make clean                                 remove the virtual environment; never a cache or a run
#
# Variables, with their defaults:
#   CACHE=cache         a folder, or a URL: s3://bucket/cache, gs://..., hf://..., https://... (to read)
#   DATA                a folder; "tars/{00000..00099}.tar"; *.parquet; a data set saved to disk  (preprocess status repair)
#   FAMILY=flux         or sd15, sdxl; training reads it from CACHE                         (preprocess status repair plan)
#   MODEL               default: FAMILY's, black-forest-labs/FLUX.1-dev  CONDITION=lineart  RESOLUTION=512  (preprocess status)
#   GPUS=0,1,2,3        a process on each        ENGINE=ray  on a Ray cluster               (preprocess)
#   ADAPTER=controlnet  DEPTH=2-4  NAME=depth-<DEPTH>  STEPS=10000  GPUS=1  MEMORY=40GB  GLOBAL_BATCH=8  (train)
#   DEPTHS RATES SEEDS  to combine    NAME=sweep  GPUS=0,1 (one experiment on each)  SHARED_BASE=1 (all on one base)  (sweep)
#   RUNS="runs/a runs/b"  or a sweep's folder      OUT=compare.html                          (compare)
#   DEPTH=all  RESOLUTION=512  TEXT_LENGTH=512  BATCH=1  GPU=a100|h200|4090  MEMORY=40GB  SAMPLES=10000  (plan)
#   RECIPE=some.yaml    options from a file             ARGS="--option value ..."  any option of the command
#   UNDERDRAWING_PATH=~/mine  families, conditions and adapters of your own, laid out as here
#   every option: python -m preprocess --help, python -m train --help, python -m train.sample --help, ...

CACHE ?= cache
PYTHON ?= python3
VENV := .venv
RUN_PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# Threads that wait without spinning: on a machine that does anything else, spinning ones slow each other down.
export OMP_WAIT_POLICY ?= PASSIVE

option = $(if $($(1)),--$(2) $($(1)))
quoted = $(if $($(1)),--$(2) "$($(1))")
recipe = $(call option,RECIPE,recipe)

comma := ,
# CONDITION="lineart canny" and CONDITION=lineart,canny are the same
several = $(if $($(1)),--$(2) $(subst $(comma), ,$($(1))))
data = $(if $(DATA),--data "$(DATA)")
of_preprocess = $(call option,FAMILY,family) $(call option,MODEL,model) $(call several,CONDITION,condition) $(call option,RESOLUTION,geometry.resolution)

.PHONY: help demo preprocess train sweep compare sample export upload plan status inspect verify repair prune test check-adherence lint torture bench bench-cache clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(INSTALLED): requirements.txt requirements-dev.txt requirements-ray.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV) (a few minutes and 7 GB, once)"
	$(PYTHON) -m venv $(VENV)
	$(RUN_PYTHON) -m pip install --quiet --upgrade pip
	$(RUN_PYTHON) -m pip install --quiet -r requirements-dev.txt
	@touch $(INSTALLED)

$(VENV)/.bench-installed: $(INSTALLED) requirements-bench.txt
	$(RUN_PYTHON) -m pip install --quiet -r requirements-bench.txt
	$(RUN_PYTHON) -m pip install --quiet --no-deps mosaicml-streaming==0.13.0
	@touch $@

demo: $(INSTALLED)
	@$(RUN_PYTHON) -m examples.demo $(ARGS)

preprocess: $(INSTALLED)
	@$(if $(DATA),,echo 'error: make preprocess needs DATA=folder-of-images' >&2; exit 2)
	@$(RUN_PYTHON) -m preprocess $(recipe) $(data) --cache "$(CACHE)" $(of_preprocess) \
		$(call option,ENGINE,engine.kind) $(call several,GPUS,engine.gpus) $(ARGS)

train: $(INSTALLED)
	@$(if $(filter-out 1,$(or $(GPUS),1)),$(VENV)/bin/torchrun --standalone --nproc-per-node $(GPUS) -m,$(RUN_PYTHON) -m) train \
		$(recipe) --cache "$(CACHE)" $(call option,ADAPTER,adapter) $(call option,DEPTH,depth) $(call option,NAME,name) \
		$(call option,MODEL,model) \
		$(call several,CONDITION,condition) $(call option,STEPS,steps) $(call option,MEMORY,memory.budget) \
		$(call option,GLOBAL_BATCH,loader.global-batch) $(ARGS)

sweep: $(INSTALLED)
	@$(RUN_PYTHON) -m train.sweep $(recipe) --cache "$(CACHE)" $(call several,DEPTHS,depths) $(call several,RATES,rates) \
		$(call several,SEEDS,seeds) $(call option,NAME,name) $(call option,MODEL,model) $(call several,CONDITION,condition) \
		$(call option,ADAPTER,adapter) $(call option,DEPTH,depth) $(call option,STEPS,steps) \
		$(call option,MEMORY,memory.budget) $(call option,GLOBAL_BATCH,loader.global-batch) $(call several,GPUS,gpus) $(if $(SHARED_BASE),--shared-base True) $(ARGS)

compare: $(INSTALLED)
	@$(if $(RUNS),,echo 'error: make compare needs RUNS="runs/a runs/b", or the folder of a sweep' >&2; exit 2)
	@$(RUN_PYTHON) -m train.compare --runs $(RUNS) $(call option,OUT,out) $(ARGS)

sample: $(INSTALLED)
	@$(if $(and $(RUN),$(or $(PAIRS),$(PROMPT))),,echo \
		'error: make sample needs RUN=runs/NAME IMAGE=drawing.png PROMPT="...", or PAIRS=pairs.jsonl for the last two; with a LoRA or a base PROMPT alone' >&2; exit 2)
	@$(RUN_PYTHON) -m train.sample --run "$(RUN)" $(call quoted,IMAGE,image) $(call quoted,PROMPT,prompt) \
		$(call quoted,PAIRS,pairs) $(ARGS)

export: $(INSTALLED)
	@$(if $(RUN),,echo 'error: make export needs RUN=runs/NAME' >&2; exit 2)
	@$(RUN_PYTHON) -m train.export --run "$(RUN)" $(call option,STEP,step) $(ARGS)

upload: $(INSTALLED)
	@$(if $(and $(RUN),$(REPO)),,echo 'error: make upload needs RUN=runs/NAME REPO=org/name' >&2; exit 2)
	@$(RUN_PYTHON) -m train.upload --run "$(RUN)" --repo "$(REPO)" $(call option,STEP,step) $(ARGS)

plan: $(INSTALLED)
	@$(RUN_PYTHON) -m train.plan $(recipe) --cache "$(CACHE)" $(call option,FAMILY,family) \
		$(call option,ADAPTER,adapter) $(call option,DEPTH,depth) $(call option,RESOLUTION,resolution) \
		$(call option,TEXT_LENGTH,text-length) $(call option,BATCH,loader.batch-size) $(call option,GPU,gpu) \
		$(call option,MEMORY,memory.budget) $(call option,SAMPLES,samples) $(call option,MODEL,model) $(ARGS)

status: $(INSTALLED)
	@$(RUN_PYTHON) -m preprocess.status $(recipe) $(data) --cache "$(CACHE)" $(of_preprocess) $(ARGS)

inspect: $(INSTALLED)
	@$(RUN_PYTHON) -m shared.inspect --cache "$(CACHE)" $(call option,MODEL,model) $(ARGS)

verify: $(INSTALLED)
	@$(RUN_PYTHON) -m shared.cache.verify "$(CACHE)"

repair: $(INSTALLED)
	@$(RUN_PYTHON) -m preprocess.repair $(recipe) $(data) --cache "$(CACHE)" $(of_preprocess) $(ARGS)

prune: $(INSTALLED)
	@$(RUN_PYTHON) -m shared.cache.prune "$(CACHE)" $(if $(YES),--yes) $(ARGS)

test: $(INSTALLED)
	@$(RUN_PYTHON) -m pytest -n 2 --dist loadfile $(ARGS)

check-adherence: $(INSTALLED)
	@$(RUN_PYTHON) -m examples.check_adherence $(ARGS)

lint: $(INSTALLED)
	@$(RUN_PYTHON) -m ruff check .
	@$(RUN_PYTHON) -m ruff format --check .
	@$(RUN_PYTHON) -m mypy

torture: $(INSTALLED)
	@$(RUN_PYTHON) -m benchmarks.torture $(ARGS)

bench: $(INSTALLED)
	@$(RUN_PYTHON) -m benchmarks.step $(ARGS)

bench-cache: $(VENV)/.bench-installed
	@$(RUN_PYTHON) -m benchmarks.cache $(ARGS)

clean:
	rm -rf $(VENV)
