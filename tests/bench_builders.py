"""How fast the builders of training data are in the toy world, and how long they wait for models:

    python tests/bench_builders.py [--num 256]

Prints for each builder source records per second, rows made, and the share of the time spent in the
models that are asked (teacher, judge); the rest is data.py's own: loading, parsing, ranking,
writing. The candidates of generators are sampled by dpo.py.
"""
import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch

import data
import toy_teacher
import toy_world
from bench_judge import timed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", default="out/judge-dpo/model", help="teacher, and who writes the traces that are ranked")
    parser.add_argument("--num", type=int, default=256, help="pairs; a quarter as many questions")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    spent, load_judge, build_file = {}, data.load_judge, data.build_file

    def load(name, **options):
        """The judge by name, timed; "coin" says at random which text is better."""
        judge = load_judge(name, **options) if name != "coin" else coin
        return timed(judge, spent, "asked")

    def coin(questions, temperature):
        return [json.dumps({"winner": f"Answer {1 + torch.randint(2, ()).item()}"}) for _ in questions]

    data.load_judge = load
    data.build_file = timed(build_file, spent, "all")                           # without the loading of models
    print("builder                          source records/s     rows   asked models")
    with tempfile.TemporaryDirectory() as folder:
        pairs, questions = f"{folder}/pairs.jsonl", f"{folder}/questions.jsonl"
        data.write_jsonl(pairs, toy_world.Records("train", "pair", args.num))
        data.write_jsonl(questions, toy_world.Records("train", "question", args.num // 4))
        for name, num, argv in (
                ("distill, toy teacher", args.num, ["distill", pairs, "--teacher", f"{toy_teacher.__file__}:teacher"]),
                ("distill, the judge as teacher", args.num, ["distill", pairs, "--teacher", args.judge]),
                ("rank, 2 traces, heuristic", args.num, ["rank", pairs, "--model", args.judge, "--num-samples", "2"]),
                ("rank, 2 traces, a judge", args.num, ["rank", pairs, "--model", args.judge, "--num-samples", "2", "--judge", "coin"]),
                ("sift, 4 answers", args.num // 4, ["sift", questions, "--model", args.judge, "--judge", "coin", "--max-new-tokens", "8"])):
            spent.clear()
            out = Path(folder, f"{len(list(Path(folder).iterdir()))}.jsonl")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                data.main([*argv, "--out", str(out)])
            rows = out.read_text().count("\n")
            print(f"{name:32s}{num / spent['all']:17.1f}{rows:9d}{spent['asked'] / spent['all']:15.1%}", flush=True)


if __name__ == "__main__":
    main()
