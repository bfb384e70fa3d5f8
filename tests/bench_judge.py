"""How fast the local judge is and what a comparison is worth: python tests/bench_judge.py [--judge FOLDER] [--groups 24]

Prints comparisons per second at batch 1, 8 and 64 (median of --runs, in turns), the speed-up of batching, the shares of time in
preprocessing and in the vision tower, and the pair budget: how well group advantages follow the true quality of toy scenes for every
choice of pairs, and how many calls it takes.
"""
import argparse
import os
import random
import statistics
import sys
import time
from itertools import permutations
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch

import toy_world as W
from reward import Comparison, LocalJudge, group_advantages, parse_verdict, sample_pairs, win_rates


def timed(function, spent, name):
    """The function, its seconds added to spent[name]."""
    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name] = spent.get(name, 0) + time.perf_counter() - start
    return call


def toy_pairs(num):
    records = W.Records("val", "pair", num, 11)
    return [Comparison(r["prompt"], [r["images"][0]], [r["images"][1]]) for r in (records[i] for i in range(num))]


def bench_batches(judge, runs, num):
    pairs = toy_pairs(num)
    spent, seconds = {}, {1: [], 8: [], 64: []}
    visual = judge.model.model.visual
    visual.forward, judge.processor.image_processor.preprocess = (timed(f, spent, n) for f, n in (
        (visual.forward, "vision tower"), (judge.processor.image_processor.preprocess, "preprocessing")))
    judge(pairs[:8])
    shares = {}
    for _ in range(runs):
        for batch in seconds:
            spent.clear()
            judge.batch_size, start = batch, time.perf_counter()
            judge(pairs[:min(num, 8 * batch)])
            seconds[batch].append((time.perf_counter() - start) / min(num, 8 * batch))
            shares[batch] = {name: s / (seconds[batch][-1] * min(num, 8 * batch)) for name, s in spent.items()}
    base = statistics.median(seconds[1])
    print(f"batch  comparisons/s  against batch 1  preprocessing  vision tower      ({runs} runs, medians; shares of the last)")
    for batch, values in seconds.items():
        each = statistics.median(values)
        print(f"{batch:5d} {1 / each:14.1f} {base / each:15.1f}x {shares[batch]['preprocessing']:13.1%} {shares[batch]['vision tower']:13.1%}")


def quality(prompt, scenes):
    """People's win rate of each scene in its group: the truth that advantages should follow."""
    wins = [0.0] * len(scenes)
    for i, j in permutations(range(len(scenes)), 2):
        label = W.judge_pair(prompt, scenes[i], scenes[j])[1]
        wins[i] += {1: 1, 2: 0, 0: .5}[label]
    return torch.tensor(wins)


def bench_budget(judge, num_groups, G, draws):
    rng, groups = random.Random(5), []
    for _ in range(num_groups):
        prompt = W.sample_prompt(rng, held_out=True)
        scenes = [W.sample_scene(prompt, rng) for _ in range(G)]
        groups.append((prompt, [W.render(prompt, s) for s in scenes], quality(prompt, scenes)))
    asked = [(k, i, j) for k in range(num_groups) for i, j in permutations(range(G), 2)]
    judge.batch_size = 256
    texts = judge([Comparison(groups[k][0]["text"], [groups[k][1][i]], [groups[k][1][j]]) for k, i, j in asked])
    verdicts = {key: parse_verdict(text) for key, text in zip(asked, texts)}
    print(f"\npairs                 calls  correlation with true quality    ({num_groups} groups of {G}, {draws} draws each, alpha 0.7)")
    for pairs, both in (("all", True), ("all", False), ("ring:4", False), ("ring:3", False), ("ring:2", False), ("ring:2", True), ("ring:1", False)):
        correlations, calls = [], 0
        for k, (_, _, truth) in enumerate(groups):
            for _ in range(draws):
                chosen = sample_pairs(G, pairs, rng)
                chosen += [pair[::-1] for pair in chosen] * both
                advantages = group_advantages(win_rates(chosen, [verdicts[k, i, j] for i, j in chosen], G))
                calls = len(chosen)
                if advantages.std() > 0 and truth.std() > 0:
                    correlations.append(torch.corrcoef(torch.stack([advantages, truth]))[0, 1].item())
        name = pairs + ", both orders" * both
        print(f"{name:20s} {calls:6d} {statistics.mean(correlations):12.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", default="out/judge-dpo/model", help="folder of a toy judge")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--num", type=int, default=256, help="comparisons at batch 64; smaller batches take 8 batches")
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--group-size", type=int, default=9)
    parser.add_argument("--draws", type=int, default=20)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    judge = LocalJudge(args.judge, max_new_tokens=256)
    bench_batches(judge, args.runs, args.num)
    bench_budget(judge, args.groups, args.group_size, args.draws)
