"""How fast the builders of training data are in the toy world, and how long they wait for models: python tests/bench_builders.py [--num 256]

Prints for each builder source records per second, rows made, and the shares of the time spent in the models that are asked (teacher,
policy, judge) and in the generator; the rest is data.py's own: loading, parsing, ranking, writing.
"""
import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch

import data
import sft
import toy_world
from bench_judge import timed

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", default="out/judge-dpo/model", help="policy of rank, judge of rank and sift")
    parser.add_argument("--generator", default="out/generator-sft/model")
    parser.add_argument("--num", type=int, default=256, help="pairs; a quarter as many prompts")
    parser.add_argument("--num-candidates", type=int, default=8, help="sift: per prompt")
    parser.add_argument("--judge-batch", default="128")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    spent, open_judge = {}, data.open_judge
    data.open_judge = lambda *a, **k: timed(open_judge(*a, **k), spent, "asked")
    toy_world.teacher, sft.sample_media = timed(toy_world.teacher, spent, "asked"), timed(sft.sample_media, spent, "generator")
    append_rows = data.append_rows
    data.append_rows = timed(append_rows, spent, "all")                         # without the loading of models
    judged = ["--judge-batch", args.judge_batch, "--max-new-tokens", "256"]
    print("builder                          source records/s     rows   asked models  generator")
    with tempfile.TemporaryDirectory() as folder:
        pairs, prompts = f"{folder}/pairs.jsonl", f"{folder}/prompts.jsonl"
        with contextlib.redirect_stdout(io.StringIO()):
            data.main(["toy", pairs, "--num", str(args.num)])
            data.main(["toy", prompts, "--kind", "prompt", "--num", str(args.num // 4)])
        sift = ["sift", prompts, "--model", args.generator, "--judge", args.judge, "--num-candidates", str(args.num_candidates), "--rank-by", "winrate"]
        for name, num, argv in (
                ("distill, toy teacher", args.num, ["distill", pairs, "--teacher", "toy"]),
                ("distill, the judge as teacher", args.num, ["distill", pairs, "--teacher", args.judge, *judged]),
                ("rank, 2 traces, heuristic", args.num, ["rank", pairs, "--policy", args.judge, "--num-traces", "2", *judged]),
                (f"sift, {args.num_candidates} candidates, ring:2", args.num // 4, [*sift, "--pairs", "ring:2", *judged])):
            spent.clear()
            out = Path(folder, f"{len(list(Path(folder).iterdir()))}.jsonl")
            with contextlib.redirect_stdout(io.StringIO()):
                data.main([*argv, "--out", str(out)])
            rows = out.read_text().count("\n")
            print(f"{name:32s}{num / spent['all']:17.1f}{rows:9d}{spent['asked'] / spent['all']:15.1%}{spent.get('generator', 0) / spent['all']:11.1%}", flush=True)
