"""The papers' claims, tried in the toy world. Every run is a line of --results; what is there is not run again.

    python tests/ablations.py signal             alpha, pair budget, order under a position bias: what they do to advantages
    python tests/ablations.py dpo                preferences with and without both-right pairs
    python tests/ablations.py joint              one judge for comparisons, scores and questions against one for each
    python tests/ablations.py reward             win rates, scores and a fixed criterion as the reward: which is hacked? (after joint)
    python tests/ablations.py grpo               alpha and pairs, trained
    python tests/ablations.py rounds             GRPO again, after the judge has seen what the policy did
    python tests/ablations.py steps              which sampling steps learn, and which drift: the generator before GRPO at some, after it at others
    python tests/ablations.py report             tables with 95 % intervals, printed and in .md beside --results, and pictures there

--models names the folder of each seed's judge-sft, judge-dpo, generator-sft (and grpo, for steps), {seed} in it is replaced; --toy that of the toy world's
files and untrained models. They are made by
    python tests/toy.py
    python sft.py --seed 0 --out out/0/judge-sft && python dpo.py --seed 0 --model out/0/judge-sft/model --out out/0/judge-dpo
    python sft.py --task generator --seed 0 --out out/0/generator-sft
"""
import argparse
import dataclasses
import functools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
from itertools import permutations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch

import data
import grpo
import toy_oracle as O
import toy_world as W
from dpo import rank_traces
from plots import plot
from reward import Candidate, Comparison, LocalJudge, group_advantages, parse_score, parse_verdict, sample_pairs, win_rates

G = 8
JUDGED = dict(batch_size=200, max_new_tokens=256)


# ---------------------------------------------------------------- what runs

def stage(args, script, out, *options):
    """The rows of the log of a stage's run in a process of its own."""
    words = [sys.executable, str(ROOT / script), "--out", str(out), *map(str, options), *args.extra]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.txt", "w") as file:
        subprocess.run(words, check=True, stdout=file, stderr=file)
    return read_log(out)


def read_log(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines() if line]


def ends(rows):
    """{"true_before": ..., "true_after": ...} of a log whose last row holds {"before": {"true": ...}, "after": {...}}."""
    return {f"{name}_{when}": number for when, numbers in rows[-1].items() for name, number in numbers.items()}


def signal(args, seed):
    """Verdicts on all ordered pairs of groups of samples, once; then what each way of asking makes of them.

    The measure is how often a sample that is true to its prompt gets a higher advantage than one of its group that is not (an equal one counts
    half; .5 is chance), {group: share} of the groups that hold both."""
    @functools.cache
    def table():
        """(prompt records, {(group, i, j): Verdict}, whether sample i of group k is true to its prompt, groups that hold both kinds)"""
        models = Path(args.models.format(seed=seed))
        judge = LocalJudge(models / "judge-dpo/model", **JUDGED)
        pipe = data.load_pipeline(models / "generator-sft/model", torch.device("cpu"))
        settings, records, media, true = grpo.parse_args(["--seed", str(seed)]), [*W.Records("val", "prompt", args.groups, seed)], [], []
        for k, record in enumerate(records):
            media.append(grpo.sample(pipe, records, [(seed, 0, k, i) for i in range(G)], settings, pipe.call_args).media)
            true.append(O.true(media[k], [record["prompt"]] * G)["true"])
        questions = [(k, i, j) for k in range(args.groups) for i, j in permutations(range(G), 2)]
        texts = judge([Comparison(records[k]["prompt"], media[k][i], media[k][j]) for k, i, j in questions])
        return records, dict(zip(questions, map(parse_verdict, texts))), true, [k for k in range(args.groups) if 0 < sum(true[k]) < G]

    def biased(k, i, j, bias):
        """The verdict of a judge that names whoever is shown first in a share `bias` of the cases, in every category."""
        verdict = table()[1][k, i, j]
        if random.Random(f"{seed} {k} {i} {j}").random() >= bias:
            return verdict
        return dataclasses.replace(verdict, winner=1, categories=[dataclasses.replace(c, winner=1) for c in verdict.categories])

    def measure(pairs="all", both=False, alpha=.7, bias=0.0, fixed=False):
        _, _, true, mixed = table()
        shares, firsts, calls = {}, {}, 0
        for k in mixed:
            found, ahead = [], []
            for draw in range(1 if fixed else args.draws):
                chosen = sample_pairs(G, pairs, random.Random(f"{seed} {k} {draw}"))
                chosen += [pair[::-1] for pair in chosen] * both
                chosen = [tuple(sorted(pair)) for pair in chosen] if fixed else chosen
                rates = win_rates(chosen, [biased(k, i, j, bias) for i, j in chosen], G)
                advantages, calls = group_advantages(rates, alpha).tolist(), len(chosen)
                ahead.append(advantages[0])
                found.append(statistics.mean((a > b) + (a == b) / 2 for a, t in zip(advantages, true[k]) if t for b, u in zip(advantages, true[k]) if not u))
            shares[k], firsts[k] = statistics.mean(found), statistics.mean(ahead)
        return {"right": shares, "first": firsts, "calls": calls}

    for alpha in (0, .3, .5, .7, 1):
        yield f"alpha {alpha}", functools.partial(measure, alpha=alpha)
    for pairs, both in (("all", True), ("all", False), ("ring:3", False), ("ring:2", False), ("ring:1", False), ("ring:2", True), ("ring:1", True)):
        yield f"pairs {pairs}{', both orders' * both}", functools.partial(measure, pairs, both)
    for bias in (0, .2, .4):
        for fixed in (True, False):
            yield f"order {'fixed' if fixed else 'random'}, bias {bias}", functools.partial(measure, bias=bias, fixed=fixed)


def grounded(trace, records, i):
    """The share of a trace's reasons about pair i of toy records that say what is to be seen: the perfect teacher's words for its scenes."""
    prompt, scenes, _, _ = records.scenes(i)
    facts = [W.facts(prompt, scene) for scene in scenes]
    criteria = [criterion for category in parse_verdict(trace).categories for criterion in category.criteria]
    right = [reason == of_image.get(c.name, ("",))[0] for c in criteria for reason, of_image in zip((c.reason_1, c.reason_2), facts)]
    return sum(right) / max(len(right), 1)


def dpo(args, seed):
    """Four traces of each of args.pairs pairs. Where all are right, they are ranked by how many of their reasons are true of the images: the
    strong judge of the paper, which only a toy world has for nothing. What can be checked in the
    text alone, by which dpo.py ranks them, tells apart `by_form` of them. `grounded` is the share
    of true reasons in greedy verdicts."""
    models, folder = Path(args.models.format(seed=seed)), Path(args.out, f"dpo-{seed}")

    @functools.cache
    def preferences():
        """{arm: preference records}, by_form"""
        judge = LocalJudge(models / "judge-sft/model", **JUDGED)
        torch.manual_seed(seed)
        records = W.Records("train", "pair", args.pairs, 100 + seed)
        pairs = [*records]
        texts = judge([data.as_question(pair) for pair in pairs for _ in range(4)], temperature=.7)
        mixed, by_truth, by_form = [], [], 0
        for n, pair in enumerate(pairs):
            traces = texts[4 * n:4 * n + 4]
            case, best, worst = rank_traces(traces, data.WINNERS[pair["winner"]])
            if case == "mixed":
                mixed.append({**pair, "chosen": best, "rejected": worst})
            elif case == "all right":
                by_form += best is not None
                worst, *_, best = sorted(traces, key=lambda trace: grounded(trace, records, n))
                if grounded(best, records, n) > grounded(worst, records, n):
                    by_truth.append({**pair, "chosen": best, "rejected": worst})
        return {"right over wrong": mixed, "right over wrong, and the better of right ones": mixed + by_truth}, by_form

    def run(arm):
        records, path = preferences()[0][arm], folder / f"{arm.replace(' ', '-').replace(',', '')}.jsonl"
        data.write_jsonl(path, random.Random(0).sample(records, len(records)))
        row = ends(stage(args, "dpo.py", path.with_suffix(""), "--model", models / "judge-sft/model", "--data", path, "--eval-data",
                         Path(args.toy, "pairs_test.jsonl"), "--seed", seed))
        after = LocalJudge(path.with_suffix("") / "model", **JUDGED)
        return {**{k: row[k] for k in row if k.startswith(("winner", "swap"))}, "grounded": truth_of_reasons(after, args.pairs), "pairs": len(records), "by_form": preferences()[1]}

    yield "no DPO", lambda: {"grounded": truth_of_reasons(LocalJudge(models / "judge-sft/model", **JUDGED), args.pairs), "pairs": 0}
    for arm in ("right over wrong", "right over wrong, and the better of right ones"):
        yield arm, functools.partial(run, arm)


def truth_of_reasons(judge, num):
    """The mean of `grounded` over the judge's greedy verdicts on validation pairs."""
    records = W.Records("val", "pair", min(num, 200), 3)
    texts = judge([data.as_question(pair) for pair in records])
    return statistics.mean(grounded(text, records, i) for i, text in enumerate(texts))


KINDS = {"comparisons": "trace", "scores": "score", "questions": "question"}


def joint(args, seed):
    """The judge from nothing on one kind of records, or on a third of each, for equally many steps of 16 records; measured on all three."""
    held_out = {kind: [*W.Records("val", kind, args.held_out, 9)] for kind in ("pair", "score", "question")}

    def run(arm, steps):
        folder = Path(args.out, f"joint-{seed}-{arm}-{steps}")
        records, names = [], [arm] if arm in KINDS else [*KINDS]
        for name in names:
            records += W.Records("train", KINDS[name], 16 * steps // len(names), seed)
        data.write_jsonl(folder.with_suffix(".jsonl"), records)
        few = folder.with_name(f"{folder.name}-pairs.jsonl")                    # the stage's own evaluation is not used
        data.write_jsonl(few, held_out["pair"][:8])
        rows = stage(args, "sft.py", folder, "--model", Path(args.toy, "judge"), "--data", folder.with_suffix(".jsonl"), "--eval-data", few,
                     "--seed", seed, "--max-steps", steps)
        judge, pairs = LocalJudge(folder / "model", score_template="{prompt}", **JUDGED), held_out["pair"]
        result = data.evaluate_judge(judge, pairs)
        numbers = {"comparisons": result["winner_accuracy"], "loss": [row["loss"] for row in rows if "loss" in row][-1]}
        texts = {kind: judge([Candidate(r["instruction"], r["images"]) for r in held_out[kind]]) for kind in ("score", "question")}
        scores, labels = ([parse_score(t) for t in side] for side in (texts["score"], [r["response"] for r in held_out["score"]]))
        read = [(score, label) for score, label in zip(scores, labels) if score is not None]
        numbers["scores"] = torch.corrcoef(torch.tensor(read).T)[0, 1].nan_to_num().item() if len(read) > 2 else 0.0
        numbers["questions"] = statistics.mean(t.strip() == r["response"] for t, r in zip(texts["question"], held_out["question"]))
        return numbers

    for arm, steps in [(name, args.steps) for name in (*KINDS, "jointly")] + [("jointly", 3 * args.steps)]:
        yield f"{arm}, {steps} steps", functools.partial(run, arm, steps)


def painted(media, prompts):
    """A fixed criterion: the share of an image's pixels that have a colour which the prompt names. Nobody has to look at shapes or numbers."""
    values = []
    for (image,), prompt in zip(media, prompts):
        pixels = torch.from_numpy(np.array(image)).reshape(-1, 3).float()                          # (H W, 3)
        wanted = [color for name, color in O.COLORS.items() if name in prompt.split()] or [*O.COLORS.values()]
        values.append(torch.stack([(pixels - torch.tensor(c)).norm(dim=1) < 60 for c in wanted]).any(0).float().mean().item())
    return values


def curve_of(rows):
    """{"curve": [(step, true on held-out samples), ...], "reward": [(step, mean reward in training), ...]} of a log of grpo.py."""
    name = next((k for row in rows for k in row if k.startswith("reward/")), None)
    last = ends(rows)
    return {"curve": [(0, last["true_before"])] + [(r["step"], r["held_out_true"]) for r in rows if "held_out_true" in r],
            "reward": [(r["step"], r[name]) for r in rows if name in r] if name else [(r["step"], r["held_out_win_rate"]) for r in rows if "held_out_win_rate" in r],
            **{k: last[k] for k in last if k.startswith(("true_", "cast_", "tiles_", "grain_", "edges_", "win_rate"))}}


def train(args, seed, arm, *options):
    models = Path(args.models.format(seed=seed))
    rows = stage(args, "grpo.py", Path(args.out, f"{arm}-{seed}".replace(" ", "-").replace(":", "").replace(",", "")), "--model", models / "generator-sft/model",
                 "--data", Path(args.toy, "prompts.txt"), "--eval-data", Path(args.toy, "prompts_test.txt"), "--seed", seed, *options)
    return {**curve_of(rows), "calls": sum(r.get("verdicts", 0) for r in rows), "ties": statistics.mean(r["ties"] for r in rows if "ties" in r)}


def reward(args, seed):
    """GRPO for long, at one judge call a sample: comparisons in ring:1, pointwise scores of a judge that learned nothing else (which
    `joint --arms scores` leaves), and `painted`."""
    options = ["--max-steps", args.long, "--warmup-steps", 4, "--eval-every", 6, "--kl", 0]
    pair, scorer = Path(args.models.format(seed=seed), "judge-dpo/model"), Path(args.out, f"joint-{seed}-scores-{args.steps}/model")
    run = functools.partial(train, args, seed)
    yield "win rates", functools.partial(run, "reward win rates", *options, "--judge", pair, "--pairs", "ring:1")
    yield "scores", functools.partial(run, "reward scores", *options, "--judge", scorer, "--reward", "score")
    yield "a fixed criterion", functools.partial(run, "reward fixed", *options, "--reward", f"{ROOT / 'tests/ablations.py'}:painted")


ARMS = {**{f"alpha {a}": ["--alpha", a] for a in (0, .3, .5, .7, 1)}, "all": ["--pairs", "all"], "ring:3": ["--pairs", "ring:3"]}


def train_arms(args, seed):
    """GRPO with the defaults (alpha .7, ring:1) but for one option."""
    for arm, options in ARMS.items():
        yield arm, functools.partial(train, args, seed, arm, "--judge", Path(args.models.format(seed=seed), "judge-dpo/model"), "--max-steps", args.short, "--warmup-steps", 4, "--eval-every", 0, *options)


def people_prefer(prompt, images):
    """"Image 1", "Image 2" or "Tie": what is true to the prompt, and of two that are equally so what has drifted less, by a quarter at least."""
    columns = O.true([[image] for image in images], [prompt] * 2)
    truth, drift = columns["true"], [sum(columns[name][i] for name in ("cast", "tiles", "grain")) for i in range(2)]
    if truth[0] != truth[1]:
        return "Image 1" if truth[0] > truth[1] else "Image 2"
    return "Image 1" if drift[0] < .8 * drift[1] else "Image 2" if drift[1] < .8 * drift[0] else "Tie"


def rounds(args, seed):
    """GRPO with the stage's defaults; then the judge learns, by dpo.py, from what people would say (`people_prefer`) of a sample of the base beside
    the policy's for the same training prompt and noise, mixed with the pairs that it learned from before, and the base generator is trained anew."""
    models, folder = Path(args.models.format(seed=seed)), Path(args.out, f"rounds-{seed}")
    judge, base, policy = models / "judge-dpo/model", models / "generator-sft/model", Path(args.out, f"rounds-first-{seed}/model")
    pairs, held_out = folder / "pairs.jsonl", Path(args.toy, "pairs_test.jsonl")

    def taught():
        records = data.read_records(Path(args.toy, "prompts.txt"))[:args.pairs]
        seeds = [("rounds", i) for i in range(len(records))]
        pipes = [data.load_pipeline(path, torch.device("cpu")) for path in (base, policy)]
        samples = zip(records, *[data.sample_media(pipe, records, seeds, 100, pipe.call_args) for pipe in pipes])
        found = [{"prompt": r["prompt"], "images": [one, two], "winner": people_prefer(r["prompt"], [one, two])} for r, [one], [two] in samples]
        counts = {f"people_{pair['winner']}": sum(p["winner"] == pair["winner"] for p in found) for pair in found}
        before = data.evaluate_judge(LocalJudge(judge, **JUDGED), found)["winner_accuracy"]
        data.write_jsonl(pairs, found + data.read_records(Path(args.toy, "pairs.jsonl")))
        rows = stage(args, "dpo.py", folder / "judge", "--model", judge, "--data", pairs, "--eval-data", held_out, "--seed", seed)
        after = data.evaluate_judge(LocalJudge(folder / "judge/model", **JUDGED), found)["winner_accuracy"]
        run = train(args, seed, "rounds second", "--judge", folder / "judge/model")
        return {**run, **counts, "policy_pairs_before": before, "policy_pairs_after": after, **{k: v for k, v in ends(rows).items() if k.startswith("winner")}}

    yield "first", lambda: train(args, seed, "rounds first", "--judge", judge)
    yield "second, judge taught", taught


def steps(args, seed):
    """Held-out samples whose sampling steps are taken by the generator before or after grpo.py, ten steps in all."""
    models, cpu = Path(args.models.format(seed=seed)), torch.device("cpu")

    @functools.cache
    def pipes():
        return [data.load_pipeline(models / name / "model", cpu) for name in ("generator-sft", "grpo")]

    def measure(taken):
        before, after = pipes()
        records = data.read_records(Path(args.toy, "prompts_test.txt"))[:args.pairs]
        stock, calls = before.transformer.forward, []

        def forward(*inputs, **options):
            calls.append(len(calls) % before.call_args["num_inference_steps"])
            return (after.transformer.forward if calls[-1] in taken else stock)(*inputs, **options)
        before.transformer.forward = forward
        media = data.sample_media(before, records, [("held out", i) for i in range(len(records))], 96, before.call_args)
        before.transformer.forward = stock
        return {name: statistics.mean(x for x in column if x == x) for name, column in O.true(media, [r["prompt"] for r in records]).items()}

    for arm, taken in {"none": (), "all": range(10), "the first 3": range(3), "the first 5": range(5), "the last 7": range(3, 10), "the last 3": range(7, 10)}.items():
        yield f"{arm} after GRPO", functools.partial(measure, taken)


CLAIMS = {"signal": signal, "dpo": dpo, "joint": joint, "reward": reward, "grpo": train_arms, "rounds": rounds, "steps": steps}


# ---------------------------------------------------------------- what came out

def spread(values):
    """(mean, half of its 95 % interval) of some runs, by Student's t."""
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
    mean = statistics.mean(values)
    return mean, t.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def bootstrap(values, draws=2000):
    """(mean, half of its 95 % interval) over groups, drawn again with replacement."""
    if not values:
        return math.nan, math.nan
    values = np.array(values)
    means = values[np.random.default_rng(0).integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [.025, .975])
    return values.mean(), (high - low) / 2


def report(args, rows):
    """Tables as Markdown, on the terminal and beside --results, and pictures there."""
    by, lines, folder = {}, [], Path(args.results).parent
    for row in rows:
        by.setdefault(row["claim"], {}).setdefault(row["arm"], []).append(row)
    for claim, arms in by.items():
        seeds = sorted({row["seed"] for runs in arms.values() for row in runs})
        lines += ["", f"## {claim}", "", " ".join(CLAIMS[claim].__doc__.split()), "", f"Seeds {', '.join(map(str, seeds))}, in this order between slashes; ± is half of a 95 % interval over {'the groups of all seeds' if claim == 'signal' else 'seeds'}.", ""]
        if claim == "signal":
            lines += signal_table(arms)
            draw_signal(arms, folder / "signal.png")
            lines += ["", "![signal](signal.png)"]
            continue
        names = {"dpo": ["winner_accuracy_before", "winner_accuracy_after", "swap_consistency_after", "grounded", "pairs", "by_form"], "joint": [*KINDS],
                 "reward": ["true_before", "true_after", "cast_before", "cast_after"], "grpo": ["true_before", "true_after", "cast_before", "cast_after", "calls"],
                 "rounds": [f"{name}_{when}" for name in ("true", "cast", "tiles", "grain", "edges") for when in ("before", "after")] + ["policy_pairs_before", "policy_pairs_after"],
                 "steps": ["true", "cast", "tiles", "grain", "edges"]}[claim]
        lines += ["| | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
        for arm, runs in arms.items():                                          # what a joint arm does not learn is not shown
            cells = [[row[name] for row in runs if name in row and (claim != "joint" or arm.split(",")[0] in (name, "jointly"))] for name in names]
            lines.append(f"| {arm} | " + " | ".join(" / ".join(f"{value:.4g}" for value in cell) for cell in cells) + " |")
        what, reference = {"dpo": ("winner_accuracy", "right over wrong"), "reward": ("true", "win rates"), "grpo": ("true", "alpha 0.7"), "rounds": ("true", "first")}.get(claim, ("", ""))
        gains = {arm: {row["seed"]: 100 * (row[f"{what}_after"] - row[f"{what}_before"]) for row in runs if f"{what}_after" in row} for arm, runs in arms.items()}
        if reference in gains:
            lines += ["", f"| | points gained | against {reference}, paired by seed |", "|---|---|---|"]
            for arm, gain in [(arm, gain) for arm, gain in gains.items() if gain]:
                paired = [gain[seed] - gains[reference][seed] for seed in gain if seed in gains[reference]]
                gap = "" if arm == reference else "{:+.1f} ± {:.1f}".format(*spread(paired or [math.nan]))
                lines.append("| {} | {:+.1f} ± {:.1f} | {} |".format(arm, *spread([*gain.values()]), gap))
        if claim == "reward":
            plot({"true to the prompt, step": {arm: [row["curve"] for row in runs] for arm, runs in arms.items()},
                  "reward in training, each scaled to 0..1, step": {arm: [scaled(row["reward"]) for row in runs] for arm, runs in arms.items()}}, folder / "reward.png")
            for label, what in (("true to the prompt", "curve"), ("the reward", "reward")):
                lines += ["", f"The mean of {label} over seeds, at the first step that was measured, every sixth or so after it, and the last"
                          f"{' (before training on all held-out prompts, after it on the first 192)' * (what == 'curve')}:", ""]
                for arm, runs in arms.items():
                    points = [(at[0][0], statistics.mean(y for _, y in at)) for at in zip(*(row[what] for row in runs))]
                    shown = points if len(points) < 12 else points[::6] + points[-1:]
                    lines.append(f"- {arm}: " + ", ".join(f"{y:.3g} at {step}" for step, y in shown))
            lines += ["", "![reward](reward.png)"]
    text = "# What `tests/ablations.py` found\n" + "\n".join(lines) + "\n"
    Path(args.results).with_suffix(".md").write_text(text)
    print(text)


def signal_table(arms):
    lines = ["| | calls a group | a true sample above a false one | against the reference, paired by group | mean advantage of item 0 |", "|---|---|---|---|---|"]
    for arm, runs in arms.items():
        reference = {"alpha": "alpha 0.7", "pairs": "pairs all", "order": f"order random, {arm.rpartition(', ')[2]}", "relation": "relation prompts, three anchors"}[arm.split()[0]]
        pool = lambda name, what="right": {(row["seed"], k): x for row in arms[name] for k, x in row[what].items()}
        mine, theirs = pool(arm), pool(reference)
        gap = "" if arm == reference else "{:+.3f} ± {:.3f}".format(*bootstrap([mine[k] - theirs[k] for k in mine if k in theirs]))
        lines.append("| {} | {} | {:.3f} ± {:.3f} of {} | {} | {:+.2f} ± {:.2f} |".format(
            arm, runs[0]["calls"], *bootstrap([*mine.values()]), len(mine), gap, *bootstrap([*pool(arm, "first").values()])))
    return lines


def draw_signal(arms, path):
    def curves(pattern, x):
        """The share of right orders of each seed through the arms that match."""
        found = [(row["seed"], x(match, row), statistics.mean(row["right"].values())) for name, runs in arms.items() if (match := re.fullmatch(pattern, name))
                 for row in runs if row["right"]]
        return [sorted((at, share) for s, at, share in found if s == seed) for seed in sorted({seed for seed, *_ in found})]

    number, calls = lambda match, row: float(match[1]), lambda match, row: row["calls"]
    plot({"alpha": {"all pairs": curves(r"alpha (.*)", number)},
          "calls a group": {"one order": curves(r"pairs [^,]*", calls), "both orders": curves(r"pairs .*, both orders", calls)},
          "verdicts for whoever is first, share": {"fixed order": curves(r"order fixed, bias (.*)", number), "random order": curves(r"order random, bias (.*)", number)}}, path)


def scaled(curve):
    low, high = min((y for _, y in curve), default=0), max((y for _, y in curve), default=0)
    return [(x, (y - low) / max(high - low, 1e-9)) for x, y in curve]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("claim", choices=[*CLAIMS, "report"])
    add("--models", default="out/{seed}", help="folder of a seed's judge-sft, judge-dpo and generator-sft")
    add("--toy", default="out/toy", help="what tests/toy.py made")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--results", default=str(ROOT / "tests/results/ablations.jsonl"), help="a line a run")
    add("--out", default="out/ablations", help="where runs leave their logs and models")
    add("--arms", default="", help="regular expression: only the arms that match")
    add("--groups", type=int, default=96, help="signal: prompts, of 8 samples each")
    add("--draws", type=int, default=20, help="signal: schedules drawn of each group")
    add("--pairs", type=int, default=800, help="dpo: pairs that traces are sampled for")
    add("--steps", type=int, default=1200, help="joint: optimizer steps")
    add("--held-out", type=int, default=300, help="joint: held-out records of each kind")
    add("--long", type=int, default=48, help="reward: optimizer steps")
    add("--short", type=int, default=16, help="grpo: optimizer steps")
    add("--extra", type=str.split, default=[], help="options added to every stage")
    args = parser.parse_args(argv)
    results = Path(args.results)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if args.claim == "report":
        return report(args, rows)
    results.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        done = {row["arm"] for row in rows if (row["claim"], row["seed"]) == (args.claim, seed)}
        for arm, measure in CLAIMS[args.claim](args, seed):
            if arm not in done and re.search(args.arms, arm):
                numbers = measure()
                with open(results, "a") as file:
                    file.write(json.dumps({"claim": args.claim, "arm": arm, "seed": seed, **numbers}) + "\n")
                print(f"{args.claim}, {arm}, seed {seed}", flush=True)


if __name__ == "__main__":
    main()
