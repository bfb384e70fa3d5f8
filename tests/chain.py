"""The whole chain of commands in the toy world, from people's choices to a better generator, and a
table of what each step gained.

    python tests/chain.py                about an hour on one core; what has ended is not run again
    python tests/chain.py --report       the table alone

All numbers are on held-out prompts and pairs, from the stages' own logs.
"""
import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = """\
python tests/toy.py --num-pairs 12000 --num-traces 1 --out out/chain/toy
python tests/toy.py --seed 1 --num-traces 1 --num-images 1 --out out/chain/more
python data.py distill out/chain/toy/pairs.jsonl --model tests/toy_teacher.py:teacher --out out/chain/traces.jsonl
python sft.py --model out/chain/toy/judge --data out/chain/traces.jsonl --eval-data out/chain/toy/pairs_test.jsonl --out out/chain/judge-sft
python dpo.py --model out/chain/judge-sft/model --data out/chain/more/pairs.jsonl --eval-data out/chain/toy/pairs_test.jsonl --out out/chain/judge-dpo
python sft.py --task generator --model out/chain/toy/generator --data out/chain/toy/images.jsonl --eval-data out/chain/toy/prompts_test.txt --out out/chain/generator-sft
python dpo.py --task generator --model out/chain/generator-sft/model --data out/chain/toy/prompts.txt --judge out/chain/judge-dpo/model --eval-data out/chain/toy/prompts_test.txt --out out/chain/generator-dpo
python grpo.py --model out/chain/generator-dpo/model --judge out/chain/judge-dpo/model --data out/chain/toy/prompts.txt --eval-data out/chain/toy/prompts_test.txt --out out/chain/grpo""".splitlines()


def out_of(command):
    """The file or folder that a command makes."""
    words = shlex.split(command)
    return words[words.index("--out") + 1]


def last_row(folder):
    """The numbers at the end of a stage's log: {"before": {name: value}, "after": {...}}."""
    return json.loads(Path(folder, "log.jsonl").read_text().splitlines()[-1])


def report(seconds):
    """Prints the gains and each command's seconds, {command: seconds}."""
    sft, dpo, generator, sifted, grpo = (last_row(f"out/chain/{name}") for name in ("judge-sft", "judge-dpo", "generator-sft", "generator-dpo", "grpo"))
    pairs, traces = (len(Path(f"out/chain/{name}.jsonl").read_text().splitlines()) for name in ("toy/pairs", "traces"))
    rows = [("distill", "pairs, then traces kept", pairs, traces, "{:.0f}"),
            ("sft.py", "judge: winner accuracy", None, sft["after"]["winner_accuracy"], "{:.3f}"),
            ("dpo.py", "judge: winner accuracy", dpo["before"]["winner_accuracy"], dpo["after"]["winner_accuracy"], "{:.3f}"),
            ("", "judge: same winner swapped", dpo["before"]["swap_consistency"], dpo["after"]["swap_consistency"], "{:.3f}"),
            ("sft.py --task generator", "true to the prompt", None, generator["after"]["true"], "{:.3f}"),
            ("dpo.py --task generator", "true to the prompt", sifted["before"]["true"], sifted["after"]["true"], "{:.3f}"),
            ("grpo.py", "true to the prompt", grpo["before"]["true"], grpo["after"]["true"], "{:.3f}"),
            ("", "color cast of the ground", grpo["before"]["cast"], grpo["after"]["cast"], "{:.1f}")]
    print(f"{'step':32s}{'what':30s}  before   after")
    for step, what, *values, form in rows:
        print(f"{step:32s}{what:30s}" + "".join(f"{'' if value is None else form.format(value):>8s}" for value in values))
    print("\nseconds: " + ", ".join(f"{Path(out_of(command)).name} {seconds.get(command, 0):.0f}" for command in COMMANDS))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", default="{}", help='JSON of options added to the commands of a script, as {"sft.py": "--max-steps 2"}')
    parser.add_argument("--report", action="store_true", help="print the table of what has run")
    args = parser.parse_args(argv)
    diary, extra = Path("out/chain/seconds.json"), json.loads(args.extra)
    seconds = json.loads(diary.read_text()) if diary.exists() else {}
    for command in COMMANDS if not args.report else []:
        if command in seconds:
            continue
        print(f"\n$ {command}", flush=True)
        words, start = shlex.split(command), time.time()
        words = [str(ROOT / word) if word.split(":")[0].endswith(".py") else word for word in words[1:]]
        resume = ["--resume"] if Path(words[0]).name in ("sft.py", "dpo.py", "grpo.py") else []          # after a kill
        subprocess.run([sys.executable, *words, *shlex.split(extra.get(Path(words[0]).name, "")), *resume], check=True)
        seconds[command] = time.time() - start
        diary.parent.mkdir(parents=True, exist_ok=True)
        diary.write_text(json.dumps(seconds, indent=1))
    report(seconds)


if __name__ == "__main__":
    main()
