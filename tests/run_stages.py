"""Runs stages in one process, as torchrun starts it: run_stages.py '[["sft", "--max-steps", "3"], ["dpo"]]'."""
import importlib
import json
import sys

for stage, *options in json.loads(sys.argv[1]):
    importlib.import_module(stage).main(options)
