"""The DPO loss, the log-probabilities under it, the ranking of traces, whole runs."""
import math
import shutil
from pathlib import Path

import pytest
import torch

from transformers import AutoModelForImageTextToText

import data
import dpo
import sft
from reward import load_processor
from test_sft import SMALL, preferences, rows, weights

GOOD = ('{"categories":[{"name":"A. Semantic Alignment","dims":[{"name":"Color","reason_1":"a","reason_2":"b","score_1":7,"score_2":3}],'
        '"cat_reason":"r","cat_winner":"Image 1"}],"reason":"r","winner":"Image 1"}')


def test_loss_is_ln2_at_equal_policies_and_the_closed_form_elsewhere():
    logps = torch.tensor([-30., -12.5])
    losses, chosen, rejected = dpo.dpo_loss(logps, logps - 1, logps, logps - 1, beta=.1)
    torch.testing.assert_close(losses, torch.full((2,), math.log(2)))
    assert chosen.eq(0).all() and rejected.eq(0).all()
    # margin .1 * ((-9 + 10) - (-24 + 20)) = .5, and -ln(1 / (1 + e^-.5)) = .474077
    loss, chosen, rejected = dpo.dpo_loss(*(torch.tensor([x]) for x in (-9., -24., -10., -20.)), beta=.1)
    torch.testing.assert_close(loss, torch.tensor([.474077]), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat([chosen, rejected]), torch.tensor([.1, -.4]))


@pytest.mark.parametrize("shared", [True, False])
def test_logps_are_minus_cross_entropy_per_token(shared, judge_folder):
    """An unshifted log-probability also gives ln 2 at step 0; only this catches it. With chosen and rejected after one prompt, each
    must be as if it were alone."""
    model, processor = AutoModelForImageTextToText.from_pretrained(judge_folder).eval(), load_processor(judge_folder)
    records = list(data.toy_world().Records("train", "trace", 3))
    pairs = [(r["response"], r["response"][:40 + 30 * i]) for i, r in enumerate(records)]
    rows = pairs if shared else [(pair[k],) for k in range(2) for pair in pairs]
    with torch.no_grad():
        logps, lengths = dpo.response_logps(model, data.encode(processor, records if shared else records * 2, rows))
    for k in range(2):
        batch = data.encode(processor, records, [pair[k] for pair in pairs])
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        for b in range(3):
            steps = [(t - 1, batch["labels"][b, t]) for t in range(1, logits.shape[1]) if batch["labels"][b, t] != -100]
            expected = sum(-torch.nn.functional.cross_entropy(logits[b, t], y) for t, y in steps)
            torch.testing.assert_close(logps[k, b].float(), expected, atol=1e-3, rtol=1e-4)
            assert lengths[k, b] == len(steps)


@pytest.mark.parametrize("traces, winner, expected", [
    ([GOOD, GOOD.replace('"winner":"Image 1"}', '"winner":"Image 2"}')], 1, ("mixed", 0, 1)),       # right over wrong
    ([GOOD, "nothing"], 1, ("mixed", 0, 1)),                                                        # an unreadable one is wrong
    ([GOOD.replace('"score_2":3', '"score_2":4'), GOOD], 1, ("all right", 1, 0)),                   # scores that do not sum to ten
    ([GOOD, GOOD], 1, ("all right", None, None)),                                                   # nothing to prefer
    ([GOOD, "nothing"], 2, ("all wrong", None, None)),
])
def test_rank_traces(traces, winner, expected):
    case, best, worst = data.rank_traces(traces, winner)
    pick = lambda i: None if i is None else traces[i]
    assert (case, best, worst) == (expected[0], pick(expected[1]), pick(expected[2]))


@pytest.mark.parametrize("lora", ["0", "4"])
def test_first_loss_is_ln2_and_resume_is_exact(lora, judge_folder, tmp_path, capsys):
    out = str(tmp_path / "run")
    args = ["--model", judge_folder, "--data", preferences(tmp_path), "--out", out, "--lora-rank", lora, "--max-steps", "4",
            "--save-every", "2", "--lr", "1e-3", "--no-bf16", *SMALL]
    dpo.main(args)
    log, whole = rows(out), weights(out, 4)
    assert abs(log[0]["loss"] - math.log(2)) < 1e-6 and log[-1]["loss"] < math.log(2)
    shutil.rmtree(Path(out, "step_000004"))
    dpo.main([*args, "--resume"])
    assert all(torch.equal(v, weights(out, 4)[k]) for k, v in whole.items())
    assert [r["loss"] for r in rows(out)] == [r["loss"] for r in log]


def test_traces_are_sampled_ranked_and_kept(judge_folder, tmp_path, monkeypatch):
    """From pairs: the judge (here one that always prefers the first image, in two wordings) writes, ranks and leaves a file."""
    answers = iter([GOOD, GOOD.replace('"score_2":3', '"score_2":1')] * 8)
    judge = lambda comparisons, temperature: [next(answers) for _ in comparisons]
    args = dpo.parse_args(["--data-num", "8", "--num-traces", "2", "--out", str(tmp_path)])
    found = dpo.sample_preferences(args, judge, sft.start_ranks())
    pairs = data.open_records("toy", "pair", 8, 0)
    assert sorted(r["prompt"] for r in found) == sorted(p["prompt"] for p in pairs if p["winner"] == "Image 1")
    assert all(r["chosen"] == GOOD for r in found) and (tmp_path / "preferences.jsonl").exists()
    assert data.comparison(found[0]).media_1[0].size == (48, 48)


def test_missing_judge_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="python sft.py"):
        dpo.main([])
