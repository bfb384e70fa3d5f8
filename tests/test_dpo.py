"""The DPO loss, the log-probabilities under it, the ranking of traces, whole runs."""
import math
import re
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import data
import dpo
import reward
import toy_world
from reward import load_processor
from test_sft import preferences, rows, small, weights

GOOD = ('{"categories":[{"name":"A. Semantic Alignment","dims":[{"name":"Color","reason_1":"a","reason_2":"b","score_1":7,"score_2":3}],'
        '"cat_reason":"r","cat_winner":"Image 1"}],"reason":"r","winner":"Image 1"}')
FAULTY = GOOD.replace('"score_2":3', '"score_2":1')      # scores that do not sum to ten


def test_loss_is_ln2_at_equal_policies_and_the_closed_form_elsewhere():
    logps = torch.tensor([-30., -12.5])
    both = torch.cat([logps, logps - 1])
    losses, stats = dpo.dpo_loss(both, both, beta=.1)
    torch.testing.assert_close(losses, torch.full((2,), math.log(2)))
    assert stats == {"loss": pytest.approx(2 * math.log(2)), "rewards/chosen": 0, "rewards/rejected": 0, "rewards/margin": 0, "rewards/accuracy": 0}
    # margin .1 * ((-9 + 10) - (-24 + 20)) = .5, and -ln(1 / (1 + e^-.5)) = .474077
    losses, stats = dpo.dpo_loss(torch.tensor([-9., -30., -24., -30.]), torch.tensor([-10., -30., -20., -30.]), beta=.1)    # beside an equal pair
    torch.testing.assert_close(losses, torch.tensor([.474077, math.log(2)]), atol=1e-6, rtol=0)
    assert stats == pytest.approx({"loss": .474077 + math.log(2), "rewards/chosen": .1, "rewards/rejected": -.4, "rewards/margin": .5, "rewards/accuracy": 1})


def test_logps_are_minus_cross_entropy_per_token(judge_folder):
    """An unshifted log-probability also gives ln 2 at step 0; only this catches it. Chosen and rejected are of unequal length."""
    model, processor = AutoModelForImageTextToText.from_pretrained(judge_folder).eval(), load_processor(judge_folder)
    records = list(toy_world.Records("train", "trace", 3))
    responses = [r["response"] for r in records] + [r["response"][:40 + 30 * i] for i, r in enumerate(records)]
    batch = data.encode(processor, records + records, responses)
    with torch.no_grad():
        logps = dpo.response_logps(model, batch)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert logps.dtype == torch.float64 and logps.shape == (6,)
    for b in range(6):
        steps = [(t - 1, batch["labels"][b, t]) for t in range(1, logits.shape[1]) if batch["labels"][b, t] != -100]
        assert len(steps) == len(processor.tokenizer(responses[b])["input_ids"]) + 1
        expected = sum(-torch.nn.functional.cross_entropy(logits[b, t], y) for t, y in steps)
        torch.testing.assert_close(logps[b].float(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("traces, winner, expected", [
    ([GOOD, GOOD.replace('"winner":"Image 1"}', '"winner":"Image 2"}')], 1, ("mixed", 0, 1)),       # right over wrong
    ([GOOD, "nothing"], 1, ("mixed", 0, 1)),                                                        # an unreadable one is wrong
    ([FAULTY, GOOD], 1, ("all right", 1, 0)),
    ([GOOD, GOOD], 1, ("all right", None, None)),                                                   # nothing to prefer
    ([GOOD, "nothing"], 2, ("all wrong", None, None)),
])
def test_rank_traces(traces, winner, expected):
    case, best, worst = dpo.rank_traces(traces, winner)
    pick = lambda i: None if i is None else traces[i]
    assert (case, best, worst) == (expected[0], pick(expected[1]), pick(expected[2]))


def test_first_loss_is_ln2_and_resume_is_exact(judge_folder, toy_folder, tmp_path, capsys):
    out = str(tmp_path / "run")
    args = [*small(toy_folder), "--model", judge_folder, "--data", preferences(tmp_path), "--out", out, "--lora-rank", "4", "--max-steps", "4",
            "--save-every", "2", "--lr", "1e-3", "--no-bf16"]
    dpo.main(args)
    log, saved = rows(out), weights(out, 4)
    assert abs(log[0]["loss"] - math.log(2)) < 1e-6 and log[-1]["loss"] < math.log(2)
    assert log[0]["rewards/margin"] == pytest.approx(0, abs=1e-5) and log[-1]["rewards/chosen"] > log[-1]["rewards/rejected"]
    assert log[-1]["rewards/accuracy"] > .5
    shutil.rmtree(Path(out, "step_000004"))
    dpo.main([*args, "--resume"])
    again = weights(out, 4)
    assert all(torch.equal(v, again[k]) for k, v in saved.items())
    assert [r["loss"] for r in rows(out)] == [r["loss"] for r in log]
    said = capsys.readouterr().out
    assert "8 preferences, 4 a step" in said and re.search(r"winner_accuracy +before [\d.]+ +after [\d.]+", said)
    assert said.count("overall: ") == 4                     # a verdict before and after each run


def test_without_adapters_there_is_no_reference(capsys):
    with pytest.raises(SystemExit):
        dpo.parse_args(["--lora-rank", "0"])
    assert "the reference is the model without adapters: pass --lora-rank 1 or more" in capsys.readouterr().err


class TwoWordings:
    """In the place of the judge that writes traces: it always prefers the first image, in two wordings."""
    asked = 0

    def __init__(self, path, **options):
        pass

    def __call__(self, questions, temperature):
        type(self).asked += len(questions)
        assert temperature == .7
        return [(GOOD, FAULTY)[i % 2] for i in range(len(questions))]


def test_traces_are_sampled_ranked_kept_and_reused(judge_folder, toy_folder, tmp_path, monkeypatch, capsys):
    """From pairs the judge writes traces, which are ranked and left in a file; a run that goes on does not write them again."""
    monkeypatch.setattr(reward, "LocalJudge", TwoWordings)
    args = [*small(toy_folder), "--model", judge_folder, "--data", f"{toy_folder}/pairs.jsonl", "--out", str(tmp_path), "--num-samples", "2",
            "--lora-rank", "2", "--max-steps", "2", "--save-every", "1"]
    dpo.main(args)
    pairs = data.read_records(f"{toy_folder}/pairs.jsonl", "pair")
    preferred = data.read_records(tmp_path / "preferences.jsonl", "preference")
    rng = random.Random(0)                           # pairs are shown in a random order
    shown = [data.swap_at_random(p, rng) for p in pairs if p["winner"] != "Tie"]
    assert [r["prompt"] for r in preferred] == [p["prompt"] for p in shown if p["winner"] == "Image 1"]
    assert [p["winner"] for p in shown] != [p["winner"] for p in pairs if p["winner"] != "Tie"]
    assert all((r["chosen"], r["rejected"]) == (GOOD, FAULTY) for r in preferred)
    assert data.as_question(preferred[0]).media_1[0].size == (48, 48)
    num_questions = TwoWordings.asked
    assert num_questions == 2 * sum(p["winner"] != "Tie" for p in pairs)
    shutil.rmtree(tmp_path / "step_000002")
    dpo.main([*args, "--resume"])
    assert TwoWordings.asked == num_questions and len(rows(tmp_path)) == 2
    dpo.main(args)                                   # a new run
    assert TwoWordings.asked == 2 * num_questions


def test_no_steps_leave_the_ranked_verdicts_of_a_sampler_and_the_model_as_it_was(judge_folder, toy_folder, tmp_path):
    """The old ranking without training: the preferences are those of a named sampler, the saved model is the one to start from."""
    (tmp_path / "sampler.py").write_text(f"def sampler(questions):\n    return [({GOOD!r}, {FAULTY!r})[i % 2] for i in range(len(questions))]\n")
    dpo.main([*small(toy_folder), "--model", judge_folder, "--data", f"{toy_folder}/pairs.jsonl", "--sampler", f"{tmp_path}/sampler.py:sampler",
              "--num-samples", "2", "--lora-rank", "2", "--max-steps", "0", "--out", str(tmp_path)])
    preferred = data.read_records(tmp_path / "preferences.jsonl", "preference")
    assert preferred and all((r["chosen"], r["rejected"]) == (GOOD, FAULTY) for r in preferred) and rows(tmp_path) == []
    before, after = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (judge_folder, tmp_path / "model"))
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_nothing_to_prefer_is_an_error(judge_folder, toy_folder, tmp_path):
    """An untrained judge's verdicts are all wrong."""
    with pytest.raises(ValueError, match="nothing is preferred.*all wrong"):
        dpo.main([*small(toy_folder), "--model", judge_folder, "--data", f"{toy_folder}/pairs.jsonl", "--out", str(tmp_path)])
    assert not (tmp_path / "preferences.jsonl").exists()


def test_missing_judge_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="sft.py"):
        dpo.main([])
