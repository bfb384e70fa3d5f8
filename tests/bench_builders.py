"""How fast the builders of training data are in the toy world, and how long they wait for models:

    python tests/bench_builders.py [--num 256]

Prints for each builder source records per second, rows made, and the share of the time spent in the
models that are asked (teacher, judge); the rest is data.py's and dpo.py's own: loading, parsing,
ranking, writing.
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
import dpo
import reward
import toy_teacher
import toy_world
from bench_judge import timed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", default="out/judge-dpo/model", help="teacher, and who writes the traces that are ranked")
    parser.add_argument("--num", type=int, default=256, help="pairs; a quarter as many questions")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    spent, judge = {}, reward.load_judge(args.judge, score_template="{prompt}")

    def load(name, **_):
        """The judge by name, timed; "coin" says at random which text is better."""
        found = {args.judge: judge, "coin": coin}.get(name) or reward.load_judge(name)
        return timed(found, spent, "asked")

    def coin(questions):
        return [json.dumps({"winner": f"Answer {1 + torch.randint(2, ()).item()}"}) for _ in questions]

    def prefer(path, *options):
        """What dpo.py does before it trains."""
        args_of_stage = dpo.parse_args(["--data", path, "--model", args.judge, "--out", folder, *options])
        out = Path(folder, "preferences.jsonl")
        data.write_jsonl(out, [record for _, record in dpo.sample_preferences(args_of_stage) if record])
        return out

    def distill(path, teacher):
        out = Path(folder, f"{len(list(Path(folder).iterdir()))}.jsonl")
        data.main(["distill", path, "--model", teacher, "--out", str(out)])
        return out

    data.load_judge = dpo.load_judge = load
    print("builder                          source records/s     rows   asked models")
    with tempfile.TemporaryDirectory() as folder:
        pairs, questions = f"{folder}/pairs.jsonl", f"{folder}/questions.jsonl"
        data.write_jsonl(pairs, toy_world.Records("train", "pair", args.num))
        unanswered = [{k: v for k, v in row.items() if k != "response"} for row in toy_world.Records("train", "question", args.num // 4)]
        data.write_jsonl(questions, unanswered)
        for name, num, tokens, build, *options in (
                ("distill, toy teacher", args.num, 256, distill, pairs, f"{toy_teacher.__file__}:teacher"),
                ("distill, the judge as teacher", args.num, 256, distill, pairs, args.judge),
                ("dpo.py, 2 traces, heuristic", args.num, 256, prefer, pairs, "--num-samples", "2"),
                ("dpo.py, 2 traces, a judge", args.num, 256, prefer, pairs, "--num-samples", "2", "--judge", "coin"),
                ("dpo.py, 4 answers, a judge", args.num // 4, 8, prefer, questions, "--num-samples", "4", "--judge", "coin")):
            spent.clear()
            judge.max_new_tokens = tokens
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                out = timed(build, spent, "all")(*options)
            rows = out.read_text().count("\n")
            print(f"{name:32s}{num / spent['all']:17.1f}{rows:9d}{spent['asked'] / spent['all']:15.1%}", flush=True)


if __name__ == "__main__":
    main()
