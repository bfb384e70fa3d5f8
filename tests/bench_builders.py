"""How fast the builders of training data are in the toy world, and how long they wait for models:

    python tests/bench_builders.py [--num 256]

Prints for each builder source records per second, rows made, and the share of the time spent in the
models that are asked (teacher, sampler); the rest is data.py's and dpo.py's own: loading, parsing,
ranking, writing.
"""
import argparse
import contextlib
import io
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
    parser.add_argument("--num", type=int, default=256, help="pairs")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    spent = {}
    judge = reward.load_judge(args.judge)
    judge.max_new_tokens = 256

    def load(name, **_):
        """The judge by name, timed."""
        found = judge if name == args.judge else reward.load_judge(name)
        return timed(found, spent, "asked")

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
        pairs = f"{folder}/pairs.jsonl"
        data.write_jsonl(pairs, toy_world.Records("train", "pair", args.num))
        for name, build, *options in (
                ("distill, toy teacher", distill, f"{toy_teacher.__file__}:teacher"),
                ("distill, the judge as teacher", distill, args.judge),
                ("dpo.py, 2 traces", prefer, "--num-samples", "2"),
                ("dpo.py, 4 traces", prefer, "--num-samples", "4")):
            spent.clear()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                out = timed(build, spent, "all")(pairs, *options)
            rows = out.read_text().count("\n")
            print(f"{name:32s}{args.num / spent['all']:17.1f}{rows:9d}"
                  f"{spent['asked'] / spent['all']:15.1%}", flush=True)


if __name__ == "__main__":
    main()
