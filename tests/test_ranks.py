"""torchrun on the CPU: any number of ranks, copies (DDP) or shards (FSDP2), equals one process; a failing rank ends the run."""
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from conftest import ROOT
from data import load_pipeline
from sft import parse_args, weights_dtypes
from test_sft import preferences, rows, small, weights
from tiny_pipelines import make

COMMON = ["--max-steps", "2", "--warmup-steps", "1", "--no-bf16", "--lr", "1e-4"]
SIX = {1: ("2", "3"), 2: ("1", "3"), 3: ("1", "2")}     # ranks -> batch size and accumulation: 6 records a step, which 7 or 8 do not divide by


def launch(ranks, commands, check=True):
    """Run stages, [[name, *options], ...], one after the other under one torchrun with so many ranks."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    runner = ROOT / "tests" / "run_stages.py"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(runner),
                           json.dumps(commands)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def runs(judge_folder, generator_folder, toy_folder, tmp_path_factory):
    """The folder in which RANKS-STAGE-MODE are the runs of every stage on 1, 2 and 3 processes."""
    path = tmp_path_factory.mktemp("ranks")
    (path / "bright.py").write_text("import numpy as np\ndef bright(media, prompts):\n    return [float(np.asarray(frames[0]).mean()) for frames in media]\n")
    judge, generator = small(toy_folder), small(toy_folder, "generator")
    prompts = ["--data", f"{toy_folder}/prompts.txt", "--eval-data", f"{toy_folder}/prompts_test.txt"]
    grpo = ["grpo", "--reward", f"{path}/bright.py:bright", "--eval-every", "0"]        # an untrained judge would reward nothing
    stored, stored_pipe = path / "judge in bfloat16", path / "pipe in bfloat16"         # as released models are
    shutil.copytree(judge_folder, stored)
    AutoModelForImageTextToText.from_pretrained(judge_folder).bfloat16().save_pretrained(stored)
    shutil.copytree(generator_folder, stored_pipe)
    FluxTransformer2DModel.from_pretrained(generator_folder, subfolder="transformer").bfloat16().save_pretrained(stored_pipe / "transformer")
    stages = {"sft": ["sft", *judge, "--model", str(stored), "--optim", "adamw"],
              "sftlora": ["sft", *judge, "--model", judge_folder, "--lora-rank", "4", "--optim", "adamw"],
              "generator": ["sft", *generator, "--model", str(stored_pipe), "--optim", "adamw"],
              "dpolora": ["dpo", *judge, "--model", judge_folder, "--data", preferences(path), "--lora-rank", "4"],
              "grpo": [*grpo, *prompts, "--model", generator_folder, "--lora-rank", "4", "--group-size", "3", "--kl", "10", "--num-prompts", "4",
                       "--watch", f"{path}/bright.py:bright"]}
    pipe, call = make("Wan 2.2")                     # two experts, which ranks at different noise levels would mix up
    pipe.save_pretrained(path / "wan")
    (path / "prompts.txt").write_text("a cat\na dog\na cube\n")
    stages["wan"] = [*grpo, "--model", str(path / "wan"), "--data", str(path / "prompts.txt"), "--eval-data", str(path / "prompts.txt"), "--watch", "none",
                     "--num-prompts", "2", "--group-size", "2", "--sde-steps", "2", "--lora-rank", "2", "--pipe-args",
                     json.dumps({"num_inference_steps": 4, **call})]
    pipe, call = make("Wan 2.1")                     # which asks its transformer's dtype, and that is another while shards are gathered
    pipe.save_pretrained(path / "wan21")
    words = [word.replace(str(path / "wan"), str(path / "wan21")) for word in stages["wan"][:-4]]
    stages["wan21"] = [*words, "--kl", "0", "--pipe-args", json.dumps({"num_inference_steps": 4, **call})]
    modes = {1: {"ddp": stages}, 2: {"ddp": ["sft", "dpolora", "grpo"], "fsdp": ["sft", "dpolora", "generator", "grpo", "wan", "wan21"]},
             3: {"ddp": ["sftlora", "generator"], "fsdp": ["sftlora", "dpolora"]}}
    for ranks, chosen in modes.items():
        batch, accumulation = SIX[ranks]
        size = ["--batch-size", batch, "--accumulation", accumulation]
        sizes = {"grpo": ["--batch-size", "3"], "wan": ["--batch-size", "2"], "wan21": ["--batch-size", "2", "--bf16"]}
        launch(ranks, [[*stages[stage], *COMMON, *sizes.get(stage, size), *["--fsdp"] * (mode == "fsdp"),
                        "--out", str(path / f"{ranks}-{stage}-{mode}")] for mode, names in chosen.items() for stage in names])
    return path


@pytest.mark.parametrize("run", ["2-sft-ddp", "2-dpolora-ddp", "2-grpo-ddp", "2-sft-fsdp", "2-dpolora-fsdp", "2-generator-fsdp", "2-grpo-fsdp", "2-wan-fsdp",
                                 "3-sftlora-ddp", "3-generator-ddp", "3-sftlora-fsdp", "3-dpolora-fsdp"])
def test_ranks_equal_one_process(run, runs):
    single = f"1-{run.split('-')[1]}-ddp"
    one, many = rows(runs / single), rows(runs / run)
    assert len(one) == len(many) == 2
    zero = 1e-4 if "grpo" in run or "wan" in run else 1e-6           # advantages sum to 0, so GRPO's loss is what rounding leaves
    for a, b in zip(one, many):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=zero) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3, abs=1e-6)
    assert min(row["grad_norm"] for row in one) > 0
    a, b = weights(runs / single, 2), weights(runs / run, 2)
    apart = max((a[k] - b[k]).abs().max().item() for k in a)
    assert apart < 1.5e-4, apart                     # of 2 steps of 1e-4: Adam's sign may flip where a gradient is nearly 0
    classes = [{path.relative_to(runs / name): re.findall("[A-Za-z0-9]+(?:Model|Generation)\\b", path.read_text())
                for path in (runs / name / "model").rglob("config.json")} for name in (single, run)]
    assert classes[0] == classes[1] and any(classes[0].values())     # shards have a class of their own, which no config may name
    if "sft" in run or "generator" in run:
        name = "model.safetensors" if "sft" in run else "transformer/diffusion_pytorch_model.safetensors"
        with safe_open(runs / run / "model" / name, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}
    ends = [json.loads((runs / name / "log.jsonl").read_text().splitlines()[-1]) for name in (single, run)]
    for column, numbers in ends[0].items():          # of held-out samples, each rank its share
        assert ends[1][column] == pytest.approx(numbers, rel=1e-3, abs=1e-3, nan_ok=True)


def test_what_is_loaded_is_no_larger_than_it_has_to_be(runs, generator_folder):
    """What trains is in float32, with --fsdp as it is stored, as only shards are float32 then; what is frozen in bfloat16 on a GPU."""
    def loaded(folder, device, *options):
        dtypes = weights_dtypes(parse_args(["--task", "generator", "--bf16", *options]), torch.device(device))
        pipe = load_pipeline(folder, torch.device("cpu"), *dtypes)
        return [str(part.dtype).removeprefix("torch.") for part in (pipe.transformer, pipe.text_encoder, pipe.vae)]

    pipe = runs / "pipe in bfloat16"
    assert loaded(pipe, "cuda") == ["float32", "bfloat16", "bfloat16"] and loaded(pipe, "cpu") == ["float32"] * 3
    assert loaded(pipe, "cuda", "--fsdp") == ["bfloat16"] * 3 and loaded(generator_folder, "cuda", "--fsdp") == ["float32", "bfloat16", "bfloat16"]
    assert loaded(pipe, "cuda", "--lora-rank", "2") == ["bfloat16"] * 3 and loaded(pipe, "cpu", "--lora-rank", "2") == ["float32"] * 3
    assert loaded(pipe, "cuda", "--no-bf16") == ["float32"] * 3


def test_shards_in_bfloat16_replay_what_they_sampled(runs):
    assert [row["ratio_error"] for row in rows(runs / "2-wan21-fsdp")] == [0, 0]


def test_a_failing_rank_ends_the_run_with_its_message(judge_folder, toy_folder, tmp_path):
    """One bad record, which one of two ranks meets."""
    lines = open(preferences(tmp_path)).read().splitlines()
    bad = json.loads(lines[0]) | {"chosen": "word " * 9000}
    (tmp_path / "bad.jsonl").write_text("\n".join([json.dumps(bad), *lines[1:4]]) + "\n")
    began = time.time()
    done = launch(2, [["dpo", *small(toy_folder), "--model", judge_folder, "--data", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "run"), *COMMON,
                       "--batch-size", "2", "--max-steps", "3"]], check=False)
    assert done.returncode and time.time() - began < 60
    assert "bad.jsonl:1:" in done.stderr and "tokens" in done.stderr
