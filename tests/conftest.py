"""Paths, quiet libraries, and the tiny models and files that several tests share."""
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import torch
from transformers import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A few records of the toy world and its untrained models, as `python tests/toy.py` writes
    them."""
    import toy
    folder = tmp_path_factory.mktemp("toy") / "toy"
    toy.main(["--out", str(folder), "--num-traces", "48", "--num-pairs", "16",
              "--num-images", "24", "--num-prompts", "24",
              "--num-eval-pairs", "4", "--num-eval-prompts", "4"])
    return str(folder)


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory):
    """A tiny untrained judge as sft.py leaves one, whose verdicts end after 8 tokens."""
    import toy_models
    folder = tmp_path_factory.mktemp("judge") / "model"
    model, processor = toy_models.make_judge(0, width=32, layers=2, vision_width=24)
    model.generation_config.max_new_tokens = 8
    toy_models.save_judge(folder, model, processor)
    return str(folder)


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory):
    """A tiny generator as sft.py leaves one, its output layer given weights so that it moves."""
    import toy_models
    folder = tmp_path_factory.mktemp("generator") / "model"
    pipe = toy_models.make_generator(0, images=200)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=.05)
    toy_models.save_generator(folder, pipe)
    return str(folder)
