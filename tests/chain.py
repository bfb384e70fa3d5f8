"""The whole chain of commands in the toy world, from people's choices to a better generator, and a table of what each step gained.

    python tests/chain.py                        about an hour on one core; a command that has ended is not run again
    python tests/chain.py --report               the table alone

The commands are COMMANDS below, the README shows the same lines. All numbers are on held-out prompts and pairs, from the stages' own logs.
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
python data.py toy out/chain/pairs.jsonl --num 12000
python data.py toy out/chain/more.jsonl --num 800 --seed 1
python data.py distill out/chain/pairs.jsonl --teacher toy --out out/chain/traces.jsonl
python sft.py --data out/chain/traces.jsonl --out out/chain/judge-sft
python data.py rank out/chain/more.jsonl --policy out/chain/judge-sft/model --max-new-tokens 256 --judge-batch 200 --out out/chain/preferences.jsonl
python dpo.py --model out/chain/judge-sft/model --data out/chain/preferences.jsonl --max-new-tokens 256 --out out/chain/judge-dpo
python sft.py --task generator --out out/chain/generator-sft
python data.py sift toy:train --num 640 --model out/chain/generator-sft/model --judge out/chain/judge-dpo/model --num-candidates 8 --rank-by winrate --pairs ring:2 --max-new-tokens 256 --judge-batch 200 --batch-size 96 --out out/chain/sifted.jsonl
python dpo.py --task generator --model out/chain/generator-sft/model --data out/chain/sifted.jsonl --out out/chain/generator-dpo
python grpo.py --model out/chain/generator-dpo/model --judge out/chain/judge-dpo/model --out out/chain/grpo""".splitlines()


def out_of(command):
    """The file or folder that a command makes."""
    words = shlex.split(command)
    return words[words.index("--out") + 1] if "--out" in words else words[3]


def last_row(folder):
    """The numbers at the end of a stage's log: {name: value}."""
    return json.loads(Path(folder, "log.jsonl").read_text().splitlines()[-1])


def report(seconds):
    """Prints the gains and each command's seconds, {command: seconds}."""
    sft, dpo, sifted, grpo = (last_row(f"out/chain/{name}") for name in ("judge-sft", "judge-dpo", "generator-dpo", "grpo"))
    rows = [("distill", "pairs, then traces kept", *(len(Path(f"out/chain/{name}.jsonl").read_text().splitlines()) for name in ("pairs", "traces")), "{:.0f}"),
            ("sft.py", "judge: winner accuracy", None, sft["winner_accuracy"], "{:.3f}"),
            ("rank, dpo.py", "judge: winner accuracy", dpo["winner_accuracy_before"], dpo["winner_accuracy_after"], "{:.3f}"),
            ("", "judge: same winner swapped", dpo["swap_consistency_before"], dpo["swap_consistency_after"], "{:.3f}"),
            ("sft.py --task generator", "true to the prompt", None, sifted["true_before"], "{:.3f}"),
            ("sift, dpo.py --task generator", "true to the prompt", sifted["true_before"], sifted["true_after"], "{:.3f}"),
            ("grpo.py", "true to the prompt", grpo["true_before"], grpo["true_after"], "{:.3f}"),
            ("", "color cast of the ground", grpo["cast_before"], grpo["cast_after"], "{:.1f}")]
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
        words, began = shlex.split(command), time.time()
        resume = ["--resume"] if words[1] != "data.py" or words[2] != "toy" else []          # a chain that was killed goes on
        subprocess.run([sys.executable, str(ROOT / words[1]), *words[2:], *shlex.split(extra.get(words[1], "")), *resume], check=True)
        seconds[command] = time.time() - began
        diary.parent.mkdir(parents=True, exist_ok=True)
        diary.write_text(json.dumps(seconds, indent=1))
    report(seconds)


if __name__ == "__main__":
    main()
