"""torchrun on the CPU: two ranks equal one rank with twice the accumulation, for all three stages."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from test_sft import preferences, rows, weights

COMMON = ["--batch-size", "2", "--max-steps", "3", "--eval-num", "4", "--max-new-tokens", "8", "--warmup-steps", "1", "--no-bf16",
          "--optim", "adamw", "--lr", "1e-4"]


def launch(ranks, *command):
    """Run a stage under torchrun with so many ranks; its output is shown where it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("stage", ["sft judge", "sft generator", "dpo", "grpo"])
def test_two_ranks_equal_one_with_twice_the_accumulation(stage, judge_folder, generator_folder, tmp_path):
    name, _, task = stage.partition(" ")
    (tmp_path / "bright.py").write_text("import numpy as np\nbright = lambda media, prompts: [float(np.asarray(frames[0]).mean()) for frames in media]\n")
    options = {"sft judge": ["--model", judge_folder], "sft generator": ["--task", "generator", "--data-num", "40"],
               "dpo": ["--model", judge_folder, "--lora-rank", "4"],
               "grpo": ["--model", generator_folder, "--reward", f"{tmp_path}/bright.py:bright", "--lora-rank", "4", "--group-size", "3",
                        "--eval-every", "0", "--kl", ".1"]}[stage]            # an untrained judge would reward nothing
    options += ["--data", preferences(tmp_path)] if stage == "dpo" else []
    for ranks, accumulation in ((1, 2), (2, 1)):
        out = launch(ranks, f"{name}.py", *options, *COMMON, "--accumulation", str(accumulation), "--out", str(tmp_path / f"ranks{ranks}"))
    assert f"x {ranks} ranks" in out
    one, two = rows(tmp_path / "ranks1"), rows(tmp_path / "ranks2")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3, abs=1e-6)
    assert min(row["grad_norm"] for row in one) > 0
    a, b = weights(tmp_path / "ranks1", 3), weights(tmp_path / "ranks2", 3)
    apart = max((a[k] - b[k]).abs().max().item() for k in a)
    assert apart < 2e-4, apart                       # of 3 steps of 1e-4: Adam's sign may flip where a gradient is nearly 0
