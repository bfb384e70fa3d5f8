"""The ablations and the chain at tiny settings: every arm runs, resumes and is reported. Their numbers mean nothing here."""
import importlib
import json
import shutil

import pytest

import ablations
import chain
from conftest import ROOT


@pytest.fixture
def models(tmp_path, judge_folder, generator_folder):
    for name, folder in (("judge-sft", judge_folder), ("judge-dpo", judge_folder), ("generator-sft", generator_folder)):
        shutil.copytree(folder, tmp_path / "0" / name / "model")
    return str(tmp_path / "{seed}")


def run(claim, tmp_path, models, *options):
    ablations.main([claim, "--models", models, "--seeds", "0", "--results", str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "out"), *options])
    return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]


def test_signal_is_what_a_known_judge_makes_of_it(tmp_path, models, monkeypatch, capsys):
    """A judge that knows the oracle's truth puts all true samples first; one that always names the first favours item 0 in fixed order."""
    true, order, keep, rollout = {}, [], [], ablations.grpo.rollout              # every third sample is true
    monkeypatch.setattr(ablations.O, "success", lambda prompt, image: true[id(image)])

    class Knows:
        def __init__(self, *_, **__):
            pass

        def __call__(self, questions, **_):
            texts = []
            true.update((image, k % 3 == 0) for k, image in enumerate(order))
            for q in questions:
                a, b = (true[id(m[0])] for m in (q.media_1, q.media_2))
                winner = "Tie" if a == b else f"Image {1 if a else 2}"
                texts.append(json.dumps({"categories": [{"name": f"{x}. x", "dims": [], "cat_winner": winner} for x in "ABC"], "winner": winner}))
            return texts

    def watched(*args, **kwargs):
        found = rollout(*args, **kwargs)
        keep.append(found)                           # ids stay taken
        order.extend(id(frames[0]) for frames in found[0])
        return found
    monkeypatch.setattr(ablations, "LocalJudge", Knows)
    monkeypatch.setattr(ablations.grpo, "rollout", watched)
    rows = {r["arm"]: r for r in run("signal", tmp_path, models, "--groups", "6", "--draws", "4")}
    for arm in ("alpha 0", "alpha 1", "pairs all", "order fixed, bias 0"):
        assert all(share == 1 for share in rows[arm]["right"].values()), arm
    assert rows["pairs ring:2"]["calls"] == 16 and rows["pairs all, both orders"]["calls"] == 56
    first = {arm: sum(row["first"].values()) / len(row["first"]) for arm, row in rows.items() if row["first"]}
    assert abs(first["order random, bias 0.4"] - first["order random, bias 0"]) < first["order fixed, bias 0.4"] - first["order fixed, bias 0"]
    ablations.main(["report", "--results", str(tmp_path / "results.jsonl")])
    assert "| alpha 0.7 | 28 | 1.000 ± 0.000 of 6 | " in capsys.readouterr().out and (tmp_path / "signal.png").exists()
    assert (tmp_path / "results.md").read_text().startswith("# What")


def test_trained_claims_run_resume_and_report(tmp_path, models, capsys, monkeypatch):
    def here(args, script, out, *options):           # in this process
        importlib.import_module(script.removesuffix(".py")).main(["--out", str(out), *map(str, options), *args.extra])
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    monkeypatch.setattr(ablations, "stage", here)
    rows = run("joint", tmp_path, models, "--steps", "1", "--exam", "6", "--arms", "scores|jointly, 1 ")
    assert [r["arm"] for r in rows] == ["scores, 1 steps", "jointly, 1 steps"]
    before = (tmp_path / "results.jsonl").read_bytes()
    run("joint", tmp_path, models, "--steps", "1", "--exam", "6", "--arms", "scores|jointly, 1 ")
    assert (tmp_path / "results.jsonl").read_bytes() == before                  # nothing is run again
    monkeypatch.setattr(ablations, "ARMS", {"alpha 0.7": ["--alpha", .7]})
    grpo = "--num-prompts 2 --group-size 4 --pairs all --eval-num 4 --max-new-tokens 8 --max-parse-fail 1"
    rows = run("grpo", tmp_path, models, "--short", "1", "--extra", grpo)
    rows = run("reward", tmp_path, models, "--long", "1", "--steps", "1", "--extra", grpo.replace("--eval-num", "--eval-every 1 --eval-num"))
    assert [r["arm"] for r in rows[-4:]] == ["alpha 0.7", "win rates", "scores", "a fixed criterion"]
    ablations.main(["report", "--results", str(tmp_path / "results.jsonl")])
    assert (tmp_path / "reward.png").exists() and "| a fixed criterion | " in capsys.readouterr().out


def test_grounded_counts_the_reasons_that_are_true():
    pair = ablations.W.Records("train", "pair", 1, 5)[0]
    trace = ablations.W.teacher([pair])[0]
    assert ablations.grounded(trace, pair) == 1
    verdict = json.loads(trace)
    verdict["categories"][0]["dims"][0]["reason_1"] = "a zebra"
    num = sum(2 * len(c["dims"]) for c in verdict["categories"])
    assert ablations.grounded(json.dumps(verdict), pair) == pytest.approx(1 - 1 / num)


def test_intervals():
    assert ablations.spread([1., 2., 3.]) == pytest.approx((2, 4.303 / 3 ** .5), rel=1e-3)           # t of 2 degrees of freedom
    mean, half = ablations.bootstrap([0.] * 50 + [1.] * 50)
    assert mean == .5 and half == pytest.approx(1.96 * .05, rel=.15)


def test_the_readme_shows_the_chain():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert all(" ".join(command.split()) in lines for command in chain.COMMANDS)
