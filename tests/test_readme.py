"""Every command of the README runs, with small settings, and every file and option it names exists."""
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

import data
import dpo
import grpo
import reward
import sft
from conftest import ROOT

STAGES = {"sft.py": sft, "dpo.py": dpo, "grpo.py": grpo, "reward.py": reward, "data.py": data}
SMALL = {"sft.py": "--max-steps 2 --batch-size 4 --data-num 40 --eval-num 4 --max-new-tokens 8",
         "dpo.py": "--max-steps 1 --batch-size 4 --data-num 2 --num-traces 2 --eval-num 2 --max-new-tokens 8",
         "grpo.py": "--max-steps 1 --num-prompts 2 --group-size 3 --pairs all --eval-num 4 --max-new-tokens 8 --max-parse-fail 1 --eval-every 0",
         "reward.py": "--max-new-tokens 8", "data.py": "--num 8 --max-new-tokens 8 --chunk 4"}


def commands():
    """The lines of the README's shell blocks, continuations joined, split at &&."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


def test_the_toy_commands_run_in_order(tmp_path, monkeypatch, capsys):
    """In one folder, as a newcomer would: the README's first block, then its reward.py and data.py lines."""
    monkeypatch.chdir(tmp_path)
    ran = []
    from test_dpo import GOOD                        # the two-step judge writes nothing readable: DPO gets traces to rank
    texts = iter([GOOD, GOOD.replace('"winner":"Image 1"}', '"winner":"Image 2"}')] * 10_000)
    monkeypatch.setattr(dpo, "build_preferences", lambda judge, pairs, *a, **k: data.build_preferences(
        lambda comparisons, **k: [next(texts) for _ in comparisons], pairs, *a, **k))
    monkeypatch.setattr(data, "open_judge", lambda *a, **k: lambda questions, **k: [next(texts) for _ in questions])
    for name, color in zip("ABC", ("red", "blue", "green")):
        Image.new("RGB", (48, 48), color).save(tmp_path / f"{name}.png")
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        (tmp_path / name).write_text(text)
    for command in commands():
        words = shlex.split(command)
        if words[0] != "python" or words[1] not in STAGES or any("/" in w and "out/" not in w or w.isupper() and len(w) > 3 for w in words[2:]):
            continue                                 # pip, pytest, and real models: those are parsed below
        STAGES[words[1]].main(words[2:] + shlex.split(SMALL.get(words[1], "")))
        ran.append(words[1])
    assert ran[:4] == ["sft.py", "dpo.py", "sft.py", "grpo.py"] and ran.count("reward.py") == 4 and ran.count("data.py") == 9
    assert ran.count("sft.py") == 6 and ran.count("dpo.py") == 4 and ran.count("grpo.py") == 3
    assert "data:image/png" in (tmp_path / "group.html").read_text()
    assert {"judge-sft", "judge-dpo", "generator-sft", "grpo"} <= {p.name for p in (tmp_path / "out").iterdir()}
    for picture in ("judge-sft/verdict.png", "judge-dpo/verdict.png", "generator-sft/samples.png", "grpo/before_after.png"):
        assert Image.open(tmp_path / "out" / picture).size[0] > 100
    said = capsys.readouterr().out
    assert "max |ratio - 1| at the first update: 0\n" in said
    # each stage closes with its numbers: judges' sft.py (image, chain, video) and dpo.py (image, chain); generators' sft.py and grpo.py (image, chain,
    # video) and dpo.py (image, chain)
    assert said.count("\n  winner_accuracy   ") == 5 and said.count("\n  true   ") == 8, said


def test_every_command_parses():
    """Options in the README exist: each stage's parser accepts its lines, those for real models too."""
    seen = 0
    for command in commands():
        words = shlex.split(command)
        scripts = [i for i, w in enumerate(words) if w in STAGES]
        if scripts:
            parse = getattr(STAGES[words[scripts[0]]], "parse_args", None)
            if parse:
                parse(words[scripts[0] + 1:])
            seen += 1
        else:
            assert words[0] in ("pip", "python", "git", "cd"), command
    assert seen >= 6


@pytest.mark.parametrize("script", STAGES)
def test_help_of_every_script(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`((?:tests/)?[a-z_]+\.(?:py|txt))`", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
