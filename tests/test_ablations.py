"""The ablations at tiny settings: every arm runs, resumes and is reported. Their numbers mean nothing here."""
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import ablations


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
    true, media = {}, []                             # every third sample is true

    def oracle(group, prompts):
        for frames in group:
            true[id(frames[0])] = len(media) % 3 == 0
            media.append(frames)                     # ids stay taken
        return {"true": [float(true[id(frames[0])]) for frames in group]}

    class Knows:
        def __init__(self, *_, **__):
            pass

        def __call__(self, questions, **_):
            texts = []
            for q in questions:
                a, b = (true[id(m[0])] for m in (q.media_1, q.media_2))
                winner = "Tie" if a == b else f"Image {1 if a else 2}"
                texts.append(json.dumps({"categories": [{"name": f"{x}. x", "dims": [], "cat_winner": winner} for x in "ABC"], "winner": winner}))
            return texts

    monkeypatch.setattr(ablations.O, "true", oracle)
    monkeypatch.setattr(ablations, "LocalJudge", Knows)
    rows = {r["arm"]: r for r in run("signal", tmp_path, models, "--groups", "6", "--draws", "4")}
    for arm in ("alpha 0", "alpha 1", "pairs all", "order fixed, bias 0"):
        assert all(share == 1 for share in rows[arm]["right"].values()), arm
    assert rows["pairs ring:2"]["calls"] == 16 and rows["pairs all, both orders"]["calls"] == 56
    first = {arm: sum(row["first"].values()) / len(row["first"]) for arm, row in rows.items() if row["first"]}
    assert abs(first["order random, bias 0.4"] - first["order random, bias 0"]) < first["order fixed, bias 0.4"] - first["order fixed, bias 0"]
    ablations.main(["report", "--results", str(tmp_path / "results.jsonl")])
    assert "| alpha 0.7 | 28 | 1.000 ± 0.000 of 6 | " in capsys.readouterr().out and (tmp_path / "signal.png").exists()
    assert (tmp_path / "results.md").read_text().startswith("# What")


def test_trained_claims_run_resume_and_report(tmp_path, models, toy_folder, capsys, monkeypatch):
    def here(args, script, out, *options):           # in this process
        if script == "dpo.py":                       # an untrained judge has no verdicts to prefer
            shutil.copytree(Path(models.format(seed=0), "judge-dpo/model"), out / "model")
            return [{"before": {"winner_accuracy": .5}, "after": {"winner_accuracy": .6}}]
        importlib.import_module(script.removesuffix(".py")).main(["--out", str(out), *map(str, options), *args.extra])
        return ablations.read_log(out)

    monkeypatch.setattr(ablations, "stage", here)
    joint = ["--toy", toy_folder, "--steps", "1", "--held-out", "6", "--arms", "scores|jointly, 1 "]
    rows = run("joint", tmp_path, models, *joint)
    assert [r["arm"] for r in rows] == ["scores, 1 steps", "jointly, 1 steps"]
    before = (tmp_path / "results.jsonl").read_bytes()
    run("joint", tmp_path, models, *joint)
    assert (tmp_path / "results.jsonl").read_bytes() == before                  # nothing is run again
    monkeypatch.setattr(ablations, "ARMS", {"alpha 0.7": ["--alpha", .7]})
    grpo = "--num-prompts 2 --group-size 4 --pairs all --batch-size 8 --max-new-tokens 8 --max-parse-fail 1"
    rows = run("grpo", tmp_path, models, "--toy", toy_folder, "--short", "1", "--extra", grpo)
    rows = run("reward", tmp_path, models, "--toy", toy_folder, "--long", "1", "--steps", "1", "--extra", f"{grpo} --eval-every 1")
    assert [r["arm"] for r in rows[-4:]] == ["alpha 0.7", "win rates", "scores", "a fixed criterion"]
    rows = run("rounds", tmp_path, models, "--toy", toy_folder, "--pairs", "12", "--extra", f"{grpo} --max-steps 1 --lr .1")
    assert rows[-1]["arm"] == "second, judge taught" and rows[-1]["winner_accuracy_after"] == .6 and sum(rows[-1][name] for name in rows[-1] if name.startswith("people_")) == 12
    shutil.copytree(tmp_path / "out/rounds-first-0/model", tmp_path / "0/grpo/model")
    rows = run("steps", tmp_path, models, "--toy", toy_folder, "--pairs", "4", "--arms", "none|all|first 3")
    records = ablations.data.read_records(Path(toy_folder, "prompts_test.txt"))
    for row, name in ((rows[-3], "generator-sft"), (rows[-2], "grpo")):
        pipe = ablations.data.load_pipeline(tmp_path / "0" / name / "model", torch.device("cpu"))
        media = ablations.data.sample_media(pipe, records, [("held out", i) for i in range(4)], 4, pipe.call_args)
        grain = ablations.O.true(media, [record["prompt"] for record in records])["grain"]
        assert row["grain"] == pytest.approx(sum(grain) / 4)
    ablations.main(["report", "--results", str(tmp_path / "results.jsonl")])
    assert (tmp_path / "reward.png").exists() and "| a fixed criterion | " in capsys.readouterr().out


def test_people_prefer_what_is_true_then_what_has_drifted_less():
    """On plain grounds of known tints: a true image beats a false one whatever its tint, and of two true ones the less tinted wins."""
    from PIL import Image, ImageDraw

    def circle(fill, ground):
        image = Image.new("RGB", (48, 48), ground)
        ImageDraw.Draw(image).ellipse((16, 16, 31, 31), fill=fill)
        return image

    red, blue = (ablations.O.COLORS[name] for name in ("red", "blue"))
    plain, tinted = (236, 236, 236), (246, 236, 226)
    for first, second, winner in (((red, plain), (red, tinted), "Image 1"), ((red, tinted), (red, plain), "Image 2"),
                                  ((blue, plain), (red, tinted), "Image 2"), ((red, plain), (red, plain), "Tie")):
        assert ablations.people_prefer("a red circle", [circle(*first), circle(*second)]) == winner


def test_dpo_ranks_right_verdicts_by_their_reasons(tmp_path, models, toy_folder, monkeypatch):
    """A judge that is right half of the time, with true and false reasons by turns: both arms have their pairs, and are trained on them."""
    trained = []

    class Half:
        def __init__(self, *_, **__):
            pass

        def __call__(self, questions, temperature=0.0, **_):
            records, copies = ablations.W.Records("train", "pair", 4, 100), 4 if temperature else 1
            texts = []
            for n in range(len(questions)):
                verdict, label = records.scenes(n // copies % 4)[2:]
                if n % copies == 1 and n // copies % 2:
                    verdict = {**verdict, "winner": f"Image {3 - label}"}       # of every other pair one is wrong
                if n % copies == 2:
                    verdict["categories"][0]["dims"][0]["reason_1"] = "a zebra"
                texts.append(json.dumps(verdict))
            return texts

    def stage(args, script, out, *options):
        trained.append(sum(1 for _ in open(out.with_suffix(".jsonl"))))
        return [{"before": {"winner_accuracy": .5}, "after": {"winner_accuracy": .6, "swap_consistency": .7}}]

    monkeypatch.setattr(ablations, "LocalJudge", Half)
    monkeypatch.setattr(ablations, "stage", stage)
    rows = run("dpo", tmp_path, models, "--toy", toy_folder, "--pairs", "4")
    assert [row["arm"] for row in rows] == ["no DPO", "right over wrong", "right over wrong, and the better of right ones"]
    assert trained == [2, 4] and rows[1]["winner_accuracy_after"] == .6 and rows[1]["pairs"] == 2


def test_grounded_counts_the_reasons_that_are_true():
    records = ablations.W.Records("train", "pair", 1, 5)
    verdict = records.scenes(0)[2]
    assert ablations.grounded(json.dumps(verdict), records, 0) == 1
    verdict["categories"][0]["dims"][0]["reason_1"] = "a zebra"
    num = sum(2 * len(c["dims"]) for c in verdict["categories"])
    assert ablations.grounded(json.dumps(verdict), records, 0) == pytest.approx(1 - 1 / num)


def test_intervals():
    assert ablations.spread([1., 2., 3.]) == pytest.approx((2, 4.303 / 3 ** .5), rel=1e-3)           # t of 2 degrees of freedom
    mean, half = ablations.bootstrap([0.] * 50 + [1.] * 50)
    assert mean == .5 and half == pytest.approx(1.96 * .05, rel=.15)
