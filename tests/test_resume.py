"""kill -9 at any moment, a save too, and --resume: the run ends as if nothing had happened. tests/bench_resume.py kills more often."""
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import dpo
import sft
from conftest import ROOT
from test_sft import preferences, rows, small, state

MEASURED = ("time", "peak_gib")                      # of this machine at that time


def start(command, ranks, out):
    """The process, its output in out.txt beside its folder `out`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    with open(f"{out}.txt", "w") as log:
        return subprocess.Popen([sys.executable, *torchrun, *command, "--out", str(out), "--resume"], cwd=ROOT, env=env, start_new_session=True,
                                stdout=log, stderr=log)


def state_of(out):
    """What must be the same: weights, optimizer, log rows."""
    folder = max(Path(out).glob("step_*"))
    log = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows(out)]
    return folder.name, state(out, int(folder.name[5:])), log


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def kill_and_resume(command, out, kills, ranks=1, seed=0):
    """Run the command into out/whole and, killed so many times after a random part of a second of training, into out/killed; returns
    the moments of the kills: the last step logged, and whether a save was open."""
    rng, moments, killed = random.Random(seed), [], Path(out, "killed")
    assert start(command, ranks, Path(out, "whole")).wait() == 0, Path(out, "whole.txt").read_text()[-2000:]

    def steps():                                     # that the log has seen; its last line may be torn
        return (killed / "log.jsonl").read_text().count('\n{"step"') if (killed / "log.jsonl").exists() else 0

    while len(moments) < kills:
        before, process = steps(), start(command, ranks, killed)
        while process.poll() is None and steps() <= before:
            time.sleep(.01)
        time.sleep(rng.random() * .4)
        if process.poll() is not None:
            raise AssertionError(f"the run ended before kill {len(moments) + 1}: {Path(out, 'killed.txt').read_text()[-2000:]}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for entry in Path("/proc").glob("[0-9]*/cmdline") if ranks > 1 else []:             # torchrun's workers are in sessions of their own
            with contextlib.suppress(OSError):
                if str(killed).encode() in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)
        moments.append((steps(), (killed / "partial").exists()))
    assert start(command, ranks, killed).wait() == 0, Path(out, "killed.txt").read_text()[-2000:]
    return moments


@pytest.mark.parametrize("stage, kills", [("sft", 2), ("dpo", 1)])
def test_killed_runs_end_as_the_whole_one(stage, kills, judge_folder, toy_folder, tmp_path):
    command = [f"{stage}.py", *small(toy_folder), "--model", judge_folder, "--max-steps", "60", "--save-every", "1", "--batch-size", "2"]
    command += ["--data", preferences(tmp_path), "--lora-rank", "4"] if stage == "dpo" else []
    kill_and_resume(command, tmp_path, kills)
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "killed"))
    assert len(rows(tmp_path / "killed")) == 60


def test_broken_and_foreign_checkpoints_are_refused(judge_folder, toy_folder, tmp_path):
    out = tmp_path / "run"
    args = [*small(toy_folder), "--model", judge_folder, "--max-steps", "2", "--out", str(out)]
    sft.main(args)
    with pytest.raises(ValueError, match="other options: lora_rank 0 -> 4"):
        sft.main([*args, "--lora-rank", "4", "--resume"])
    (out / "step_000002" / ".metadata").unlink()
    with pytest.raises(ValueError, match="step_000002 is damaged: remove it, the one before is taken"):
        sft.main([*args, "--resume"])


def test_a_server_may_move_before_a_run_goes_on(judge_folder, toy_folder, tmp_path):
    args = [*small(toy_folder), "--model", judge_folder, "--data", preferences(tmp_path), "--lora-rank", "4", "--max-steps", "1", "--out", str(tmp_path / "run")]
    dpo.main([*args, "--sampler", "http://one:8000#teacher"])
    dpo.main([*args, "--sampler", "http://two:8000#teacher", "--resume"])
    with pytest.raises(ValueError, match="other options: sampler 'server#teacher' -> 'server#another'"):
        dpo.main([*args, "--sampler", "http://two:8000#another", "--resume"])


def test_other_records_under_the_same_name_are_refused(judge_folder, toy_folder, tmp_path):
    traces = data.read_records(f"{toy_folder}/traces.jsonl", "trace")
    args = [*small(toy_folder), "--model", judge_folder, "--data", f"{tmp_path}/traces.jsonl",
            "--max-steps", "1", "--out", str(tmp_path / "run")]
    data.write_jsonl(tmp_path / "traces.jsonl", traces[:8])
    sft.main(args)
    data.write_jsonl(tmp_path / "traces.jsonl", traces[:9])
    with pytest.raises(ValueError, match="other options: digest of --data '"):
        sft.main([*args, "--resume"])


def test_resume_without_a_checkpoint_starts_and_says_so(judge_folder, toy_folder, tmp_path, capsys):
    sft.main([*small(toy_folder), "--model", judge_folder, "--max-steps", "1", "--out", str(tmp_path / "run"), "--resume"])
    assert "no checkpoint in" in capsys.readouterr().out and len(rows(tmp_path / "run")) == 1


def test_a_wording_beside_an_earlier_model_does_not_stay(judge_folder, toy_folder, tmp_path):
    """dpo.py and grpo.py would ask in it."""
    old = tmp_path / "run/model/score_template.txt"
    old.parent.mkdir(parents=True)
    old.write_text("How good? {prompt}")
    sft.main([*small(toy_folder), "--model", judge_folder, "--max-steps", "1", "--out", str(tmp_path / "run")])
    assert (old.parent / "template.txt").exists() == Path(judge_folder, "template.txt").exists() and not old.exists()
