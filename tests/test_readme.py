"""Every command of the README runs, with small settings, and every file and option it names exists."""
import itertools
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

import data
import dpo
import grpo
import plots
import reward
import sft
import toy
import toy_world
from conftest import ROOT
from test_dpo import GOOD

SCRIPTS = {"sft.py": sft, "dpo.py": dpo, "grpo.py": grpo, "reward.py": reward, "data.py": data, "tests/toy.py": toy, "tests/plots.py": plots}
SMALL = {"tests/toy.py": "--num-traces 12 --num-pairs 4 --num-images 8 --num-prompts 8 --num-eval-pairs 2 --num-eval-prompts 4",
         "sft.py": "--max-steps 2 --batch-size 4",
         "dpo.py": "--max-steps 1 --batch-size 4",
         "grpo.py": "--max-steps 1 --num-prompts 2 --group-size 4 --batch-size 8 --max-new-tokens 8 --max-parse-fail 1"}
PAGES = ["README.md", "tests/README.md"]


def commands(page="README.md"):
    """The lines of a page's shell blocks, continuations joined, split at &&."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / page).read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split(" # ")[0].split("&&")]
    return [part.strip() for part in parts if part.strip()]


def run(command):
    words = shlex.split(command)
    SCRIPTS[words[1]].main(words[2:] + shlex.split(SMALL.get(words[1], "")))


def is_for_real_models(command):
    """Torchrun, servers and models of the hub: what is only parsed."""
    return not command.startswith("python ") or "HOST" in command or "my-pipeline" in command or "-m pytest" in command


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder like a fresh clone as the current one, with the README's snippets and three images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        (tmp_path / name).write_text(text)
    for name, color in zip("ABC", ("red", "blue", "green")):
        Image.new("RGB", (48, 48), color).save(tmp_path / f"{name}.png")
    return tmp_path


def test_the_toy_commands_run_in_order(newcomer, monkeypatch, capsys):
    """In one folder, as a newcomer would: the README's first block, then its other lines that need no real models."""
    def rank_pairs(sample, pairs, *args):            # two steps of SFT write nothing readable: DPO gets verdicts to rank
        verdicts = itertools.cycle([GOOD, GOOD.replace('"winner":"Image 1"}', '"winner":"Image 2"}')])
        return ranked(lambda questions, **_: [next(verdicts) for _ in questions], pairs, *args)

    ranked = dpo.rank_pairs
    monkeypatch.setattr(dpo, "rank_pairs", rank_pairs)
    ran = []
    for command in commands():
        if is_for_real_models(command):
            continue
        if command.startswith("python reward.py") and "reward.py" not in ran:       # the lines after the quick start
            data.write_jsonl("pairs.jsonl", data.read_records("out/toy/pairs_test.jsonl", "pair"))
        run(command)
        ran.append(shlex.split(command)[1])
    assert ran == ["tests/toy.py", "sft.py", "dpo.py", "sft.py", "grpo.py", "reward.py", "data.py", "grpo.py"]
    assert "data:image/png" in (newcomer / "group.html").read_text()
    pages = set(re.findall(r"`(out/\S+\.html)`", (ROOT / "README.md").read_text()))
    assert len(pages) == 2
    assert all("data:image/png" in (newcomer / page).read_text() for page in pages)
    printed = capsys.readouterr().out
    assert printed.count("max |ratio - 1| of a trial rollout: 0. It") == 2
    assert printed.count("overall: ") == 3           # verdicts after sft.py, before and after dpo.py
    assert printed.count("\n  winner_accuracy   ") == 2 and printed.count("\nwinner_accuracy   ") == 1 and printed.count("\n  true   ") == 2 and printed.count("\n  win_rate   ") == 2
    for stage in ("judge-sft", "generator-sft"):     # of two steps; the others end after one
        width, height = Image.open(newcomer / f"out/{stage}/curves.png").size
        assert width > 600 and height > 200
    plot, = re.findall(r"`(python tests/plots.py [^`]*)`", (ROOT / "README.md").read_text())
    run(plot)                                        # 4 held-out prompts, a row
    assert Image.open(newcomer / "out/grpo/before_after.png").size == (880, 166)


def test_curves_are_those_of_the_rows_that_count(tmp_path):
    """Of a step that a resumed run repeated the last row counts; half a line and numbers that never change are left out."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"args": {}}\n{"step": 1, "loss": 4, "same": 2}\n{"step": 2, "loss": 3, "same": 2}\n{"step": 3, "lo\n'
                   '{"args": {}}\n{"step": 2, "loss": 2, "same": 2, "held_out": NaN}\n{"step": 3, "loss": 1, "same": 2}\n')
    assert plots.read_curves(log) == {"loss": [(1, 4), (2, 2), (3, 1)]}
    assert plots.ticks(0, 1200) == [0, 500, 1000] and plots.ticks(.05, 6, log=True) == [.05, .1, .2, .5, 1, 2, 5]
    assert Image.open(plots.draw_curves(log)).size == (360, 230)
    log.write_text("")
    with pytest.raises(SystemExit, match="holds no number that changes"):
        plots.main([str(log)])


def test_the_picture_shows_gains_and_losses_in_proportion(tmp_path, monkeypatch, capsys):
    """Six samples became true and two no longer are: of four that are shown three are of the first kind, one of the second."""
    shown = [toy_world.Records("train", "image", 40)[i] for i in range(40)]
    true = [(r["prompt"], r["images"][0]) for r in shown if plots.is_true(r["prompt"], r["images"][0])][:8]
    blank = [(prompt, Image.new("RGB", (48, 48), "white")) for prompt, _ in true]
    sides = {"base": blank[:6] + true[6:], f"{tmp_path}/model": true[:6] + blank[6:]}
    monkeypatch.setattr(plots, "held_out_samples", lambda model, options: sides[model])
    (tmp_path / "log.jsonl").write_text('\n{"args": {"model": "base"}}\n')
    sheet = Image.open(plots.draw_samples(tmp_path, num=4))
    frames = [sheet.getpixel((220 * column + 6 + 104 * side, 24)) == (30, 170, 60) for column in range(4) for side in range(2)]
    assert frames == [False, True] * 3 + [True, False]
    said = [line.split(" samples")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["all, 8", "same objects, 0", "others, as many, 0", "more, 6", "fewer, 2"]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page):
    """Options in the READMEs exist: each script's parser accepts its lines, those for real models too."""
    num_parsed = 0
    for command in commands(page):
        words = shlex.split(command)
        scripts = [i for i, word in enumerate(words) if word in SCRIPTS]
        if scripts:
            parse = getattr(SCRIPTS[words[scripts[0]]], "parse_args", None)
            if parse:
                parse(words[scripts[0] + 1:])
                num_parsed += 1
        else:
            assert words[0] in ("pip", "vllm") or words[:3] == ["python", "-m", "pytest"] or (ROOT / words[1]).exists(), command
    assert num_parsed >= 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_every_script(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout and "[None]" not in done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_readmes_exist(page):
    """But for the README's own snippets."""
    text = (ROOT / page).read_text()
    snippets = re.findall(r"```python\n# (\w+\.py)\n", text)
    for name in re.findall(r"`((?:tests/)?[a-z_]+\.(?:py|txt|md))`", text):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists() or name in snippets, name
