"""The README's code runs as it stands, what it offers for copying works alone in an empty folder, and what it says of
memory, functions, tests and options is so."""
import ast
import base64
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap

import diffusers
import pytest
import torch
import transformers
from PIL import Image

import bench_memory
import data
import dpo
import grpo
import reward
import sft
import tiny_pipelines
from conftest import ROOT
from test_sft import block, free_names, imports, rows

README = (ROOT / "README.md").read_text()
PAGES = {ROOT / "README.md": README, ROOT / "tests/README.md": (ROOT / "tests/README.md").read_text()}


# ---------------------------------------------------------------- your own judge, reward, generator, data

@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder as the current one, with the README's named pieces of code, prompts, and three images, dark to bright."""
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README, re.S):
        (tmp_path / name).write_text(text)
    for name, grey in zip("ABC", (0, 51, 255)):
        Image.new("RGB", (48, 48), (grey,) * 3).save(tmp_path / f"{name}.png")
    (tmp_path / "prompts.txt").write_text("a bright day\na dark day\n")
    (tmp_path / "held_out.txt").write_text("a bright night\n")
    return tmp_path


def readme_options(start):
    """The options of the README's command that starts with these words."""
    text = README.replace("\\\n", " ")
    return shlex.split(re.search(rf"^{re.escape(start)}(.*)$", text, re.M)[1])


def test_your_own_judge_and_reward_improve_a_generator(here, generator_folder, capsys):
    """my_judge.py ranks three images, C before B before A, and then rewards beside brightness.py."""
    reward.main(["A.png", "B.png", "C.png", "--prompt", "a bright day", "--judge", "my_judge.py:judge"])
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["item", "win", "rate", "A", "B", "C", "advantage"]
    assert [line[:2] + line[-1:] for line in lines[:3]] == [["C.png", "1.000", "1.000"], ["B.png", "0.500", "0.000"], ["A.png", "0.000", "-1.000"]]
    options = readme_options("python grpo.py --judge my_judge.py:judge")
    grpo.main(["--judge", "my_judge.py:judge", *options, "--model", generator_folder, "--data", "prompts.txt", "--eval-data", "held_out.txt",
               "--num-prompts", "2", "--group-size", "4", "--batch-size", "8", "--max-steps", "1", "--max-parse-fail", "0"])
    row, = rows("out/bright")
    assert row["verdicts"] == 8 and row["undecided"] == 0 and row["ratio_error"] == 0
    assert 0 < row["reward/brightness.py:bright"] < 1
    assert "win_rate" in capsys.readouterr().out


def test_your_own_reward_is_a_function_of_media_and_prompts(here):
    bright, = data.load_rewards("brightness.py:bright")
    media = [reward.load_media(f"{name}.png") for name in "ABC"]
    assert data.reward_values(bright, media, ["p"] * 3)["brightness.py:bright"].tolist() == pytest.approx([0, .2, 1])


def test_your_own_generator_starts_at_ratio_1(here, capsys):
    """The README's command on a pipeline that it was not written for; SD3.5 has guidance, too."""
    pipe, call = tiny_pipelines.make("SD3.5")
    pipe.save_pretrained("my-pipeline")
    *options, steps = readme_options("python grpo.py --model my-pipeline")
    grpo.main(["--model", "my-pipeline", *options, json.dumps({**call, **json.loads(steps)})])
    assert "max |ratio - 1| of a trial rollout: 0. It" in capsys.readouterr().out
    row, = rows("out/try")
    assert row["ratio_error"] == 0 and row["grad_norm"] > 0


def test_your_own_data_becomes_pairs(here, capsys):
    (here / "votes.csv").write_text("prompt,left,right,winner\na dark day,A.png,C.png,Image 1\na bright day,A.png,C.png,Image 2\nany day,A.png,A.png,Tie\n")
    runpy.run_path("my_data.py")
    pairs = data.read_records("pairs.jsonl", "pair")
    assert [data.WINNERS[pair["winner"]] for pair in pairs] == [1, 2, 0]
    assert data.as_question(pairs[1]).media_2[0].getpixel((0, 0)) == (255, 255, 255)
    data.main(["check", "pairs.jsonl"])
    printed = capsys.readouterr().out
    assert "3 pair records" in printed and "all well formed" in printed


def test_your_own_trainer_gets_advantages(here, monkeypatch):
    """my_reward.py beside a copy of reward.py: the brightest of three images has the highest advantage."""
    shutil.copy(ROOT / "reward.py", here)
    printed = alone(here, """if 1:
        from PIL import Image
        from my_reward import advantages
        print(*advantages("a bright day", [Image.open(f"{name}.png") for name in "BCA"]).tolist())
        """)
    assert [float(word) for word in printed] == pytest.approx([0, 1, -1])


# ---------------------------------------------------------------- parts copied into another project

def definition(path, name):
    """The text of a function of a file."""
    source = (ROOT / path).read_text()
    node, = [node for node in ast.parse(source).body if getattr(node, "name", None) == name]
    return ast.get_source_segment(source, node) + "\n"


def alone(folder, script):
    """The words that a script prints in `folder`, where nothing of ours can be imported but what was copied there."""
    script += "\nimport sys\nassert not {'sft', 'dpo', 'grpo', 'toy_world'} & {*sys.modules}\n"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_reward_py_alone(tmp_path):
    """0 beats 1 and 2, who tie. A sees it so, B the other way round, C nothing: the category side is equal for all, and z of
    (1, 1/4, 1/4) times .3 is left."""
    shutil.copy(ROOT / "reward.py", tmp_path)
    printed = alone(tmp_path, """if 1:
        import json
        from reward import group_advantages, parse_verdict, win_rates

        def write(winner, *categories):
            names = ("A. Semantic", "B. Quality", "C. Aesthetics")
            return json.dumps({"categories": [{"name": n, "dims": [], "cat_winner": w} for n, w in zip(names, categories)], "winner": winner})
        pairs = [(0, 1), (2, 0), (1, 2)]
        texts = [write("Image 1", "Image 1", "Image 2", "Tie"), write("Image 2", "Image 2", "Image 1", "Tie"), write("Tie", "Tie", "Tie", "Tie")]
        rates = win_rates(pairs, [parse_verdict(text) for text in texts], 3)
        print(*rates.overall.tolist(), *rates.anchors["B"].tolist(), *rates.category.tolist(), *group_advantages(rates, alpha=.7).tolist())
        """)
    z = .5 / math.sqrt(.1875)
    assert [float(word) for word in printed] == pytest.approx([1, .25, .25, 0, .75, .75, .5, .5, .5, .3 * z, -.15 * z, -.15 * z])


def test_the_dpo_loss_alone(tmp_path):
    """ln 2 where policy and reference agree; margins of 2 and -2 at beta 1/2 give rewards 1 and -1 and the loss ln(1 + exp(-2))."""
    text = "import torch.nn.functional as F\n" + definition("dpo.py", "dpo_loss")
    (tmp_path / "loss.py").write_text(text)
    assert free_names(text) == set()
    printed = alone(tmp_path, """if 1:
        import torch
        from loss import dpo_loss
        same, logps = torch.tensor([-7., -7.]), torch.tensor([-10., -20.])
        print(dpo_loss(same, same, beta=.1)[0].item())
        losses, sums = dpo_loss(logps, logps - torch.tensor([2., -2.]), beta=.5)
        print(losses.item(), sums["rewards/chosen"], sums["rewards/rejected"])
        """)
    assert [float(word) for word in printed] == pytest.approx([math.log(2), math.log(1 + math.exp(-2)), 1, -1], abs=1e-6)


@pytest.fixture
def toolbox(tmp_path):
    """An empty folder with the toolbox of sft.py, under the file's imports, as toolbox.py, and reward.py and data.py."""
    text = imports() + block("Toolbox", 'if __name__ == "__main__"')
    assert free_names(text) == set()
    (tmp_path / "toolbox.py").write_text(text)
    for name in ("reward.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_lora_alone(toolbox):
    """y = W x + B A x: 2 + 5 * 3 = 17 with one weight each. In a network: off is the base, merged is unmerged."""
    printed = alone(toolbox, """if 1:
        import torch
        from torch import nn
        from toolbox import LoRALinear, add_lora, disable_lora, lora_layers, save_merged
        one = LoRALinear(nn.Linear(1, 1, bias=False), rank=1)
        for p, value in ((one.base.weight, 2.), (one.lora_A, 3.), (one.lora_B, 5.)):
            nn.init.constant_(p, value)
        torch.manual_seed(0)
        class Net(nn.Sequential):
            def save_pretrained(self, path):
                torch.save(self.state_dict(), path)
        model, x = Net(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(5, 3)
        base = model(x)
        add_lora(model, rank=2, targets="^[02]$")
        start = model(x)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B)
        with disable_lora():
            off = model(x)
        save_merged(model, "merged.pt")
        merged = Net(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        merged.load_state_dict(torch.load("merged.pt"))
        gap = lambda a, b: (a - b).abs().max().item()
        print("numbers", one(torch.ones(1)).item(), gap(start, base), gap(off, base), gap(merged(x), model(x)), gap(model(x), base))
        """)
    one, start, off, merged, moved = map(float, printed[printed.index("numbers") + 1:])
    assert (one, start, off) == (17, 0, 0) and merged < 1e-5 < .1 < moved


def test_the_driver_alone(tmp_path):
    """data.py beside reward.py. The Euler step as step_fn gives the stock sampler's latents bit for bit, and a step asked for by itself gives the velocity
    of the rollout: so the ratio of the two densities is 1."""
    pipe, call = tiny_pipelines.make("FLUX.1")
    pipe.save_pretrained(tmp_path / "pipe")
    for name in ("reward.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    printed = alone(tmp_path, f"""if 1:
        import torch
        from data import load_pipeline, predict, run_pipeline, seeded_generator
        pipe, call = load_pipeline("pipe", torch.device("cpu")), dict(prompt=["a cat"], **{{"num_inference_steps": 4, **{call}}})
        seen = []
        def euler(i, x, v):
            seen.append((x, v))
            return x + v * (pipe.scheduler.sigmas[i + 1] - pipe.scheduler.sigmas[i])
        with torch.no_grad():
            stock = run_pipeline(pipe, generator=seeded_generator(7), output_type="latent", **call)[0]
            ours = run_pipeline(pipe, euler, generator=seeded_generator(7), output_type="latent", **call)[0]
        x, old = seen[2]
        new = predict(pipe, x, pipe.scheduler.timesteps[2], **call)
        new.square().sum().backward()
        ratio = (-(new - old).square().mean()).exp()
        gradient = sum(p.grad.abs().sum().item() for p in pipe.transformer.parameters() if p.grad is not None)
        print(torch.equal(ours, stock), len(seen), ratio.item() - 1, stock.std().item() > .1)
        """)
    assert printed == ["True", "4", "0.0", "True"]


# ---------------------------------------------------------------- differences from the paper and from the original code

def test_the_papers_values_are_options_and_ours_are_the_defaults():
    ours = grpo.parse_args([])
    paper = grpo.parse_args("--pairs all --std-floor 0 --sde-steps 14 --clip-range 1e-4 --kl 0".split())
    assert (ours.pairs, ours.std_floor, ours.sde_steps, ours.updates, ours.alpha) == ("ring:1", .2, 3, 1, .7)
    assert (paper.pairs, paper.std_floor, paper.sde_steps, paper.clip_range, paper.kl) == ("all", 0, 14, 1e-4, 0)
    assert dpo.parse_args(["--beta", ".1"]).beta == .1


def test_std_floor_keeps_a_nearly_tied_group_quiet():
    """Of the 36 pairs of 9 images, 35 ties and one win: the winner's advantage is 2 without a floor, above the 1.46 of a perfect ranking."""
    pairs = reward.sample_pairs(9, "all")
    rates = reward.win_rates(pairs, [reward.Verdict(1)] + [reward.Verdict(0)] * 35, 9)
    perfect = reward.win_rates(pairs, [reward.Verdict(1 if i < j else 2) for i, j in pairs], 9)
    loud = reward.group_advantages(rates).max().item()
    quiet = reward.group_advantages(rates, std_floor=.2).max().item()
    best = reward.group_advantages(perfect, std_floor=.2).max().item()
    assert loud == pytest.approx(2, abs=1e-3) and quiet == pytest.approx(.0625 / .2, abs=1e-3) and quiet < 1 < best < loud


def test_a_judge_behind_a_server_sees_every_pixel():
    """As PNG; the original sends JPEG of quality 95, and mp4 of videos."""
    image = Image.frombytes("RGB", (16, 16), bytes(range(256)) * 3)
    kind, _, code = reward.data_url(image).partition(",")
    back = Image.open(io.BytesIO(base64.b64decode(code)))
    assert kind == "data:image/png;base64" and back.tobytes() == image.tobytes()


def test_the_kl_term_is_not_divided_by_dt(here, generator_folder):
    """Where all advantages are 0 the loss is --kl times the divergence, whatever the lengths of the steps."""
    (here / "once.py").write_text("""if 1:
        seen = []
        def once(media, prompts):                    # a reward that tells samples apart at the first step only
            seen.extend(media)
            return [float(i * (len(seen) <= 8)) for i in range(len(media))]
        """)
    grpo.main(["--model", generator_folder, "--data", "prompts.txt", "--eval-data", "held_out.txt", "--watch", "none", "--reward", "once.py:once",
               "--num-prompts", "2", "--group-size", "4", "--batch-size", "8", "--max-steps", "2", "--warmup-steps", "1", "--lr", "1e-2", "--kl", ".5"])
    first, second = rows("out/grpo")
    assert first["kl"] == 0 and first["zero_variance_groups"] == 0 and second["zero_variance_groups"] == 1
    assert second["kl"] > 1e-6 and second["loss"] == pytest.approx(.5 * (second["kl"] + second["later_kl"]), rel=1e-4)


# ---------------------------------------------------------------- what the READMEs name

def count(model):
    return sum(p.numel() for p in model.parameters()) / 1e9


def test_the_counted_memory_agrees_with_arithmetic():
    """Rows of tests/README.md against models of the real sizes without storage, adapters by the stages' own targets: 16 bytes a trained parameter,
    2 a frozen one. The README has their peaks."""
    page = (ROOT / "tests/README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in page.split("\n") if re.match(r"\| `(sft|dpo|grpo)\.py` \S+/", line)]
    sizes = dict(d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    text = dict(hidden_size=4096, num_hidden_layers=36, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936)
    with torch.device("meta"):
        judge = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(text_config=text, vision_config=dict(out_hidden_size=4096)))
        flux, wan = diffusers.FluxTransformer2DModel(guidance_embeds=True), diffusers.WanTransformer3DModel()
        t5 = count(transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, **sizes)))
        umt5 = count(transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=256384, **sizes)))
        J, F, W = map(count, (judge, flux, wan))
        adapters = []
        for model in (judge, wan):
            sft.add_lora(model, 64)
            adapters.append(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e9)
    j, w = adapters
    weights = [4 * J / 8, 2 * J + 4 * j, 4 * F / 8 + 2 * t5, 2 * W + 4 * w + 2 * umt5]
    for row, held, trained in zip(rows, weights, (J / 8, j, F / 8, w), strict=True):
        expected = [gb * 1e9 / 2 ** 30 for gb in (held, 4 * trained, 8 * trained)]
        assert [float(cell) for cell in row[:3]] == pytest.approx(expected, abs=.06)
        forward, backward, step, peak = map(float, row[3:7])
        assert peak == pytest.approx(sum(expected) + max(forward + backward, step), abs=.2)
    page = " ".join(page.split())
    for words in (f"8 x 2 x {J:.2f} = {16 * J:.0f} GB", f"{16 * F:.0f} GB for FLUX, and until they go to the GPUs {16 * t5:.0f} GB for its text encoders",
                  f"2 x {J:.2f} = {2 * J:.1f} GB", f"{2 * t5 * 1e9 / 2 ** 30:.1f} GiB of FLUX, {2 * umt5 * 1e9 / 2 ** 30:.1f} of Wan"):
        assert words in page, words
    assert "{}, {}, {} and {} GiB".format(*[row[6] for row in rows]) in README


def test_memory_is_counted():
    """A small judge, all weights in float32: 4 bytes a weight and a gradient, 8 of AdamW's state and 4 while it steps; 6 FLOP a weight and token, and
    more for the vocabulary, whose logits are made twice."""
    sizes = dict(depth=1, width=512, vision_width=128, vocab=512, side=64, num_text=30, num_response=20)
    gib, flop = bench_memory.count(lambda args: bench_memory.run_judge(args, **sizes), sft.parse_args(["--no-bf16"]))
    weights, gradients, optimizer, forward, backward, step, peak = gib
    assert gradients == weights and optimizer == pytest.approx(2 * weights, rel=1e-4) and step == pytest.approx(weights, rel=1e-2)
    assert peak == pytest.approx(4 * weights + max(forward + backward, step), rel=1e-4) and forward > 0 < backward
    num_tokens = 2 * (4 + 2) + 30 + 20
    blocks = 4 * (512 * (512 + 2 * 128 + 512) + 3 * 512 * 1536)
    assert 6 * blocks * num_tokens < flop < 8 * blocks * num_tokens


def test_functions_tests_and_options_that_the_readmes_name_exist():
    stages = {"reward": reward, "data": data, "sft": sft, "dpo": dpo, "grpo": grpo}
    named = re.findall(r"`(reward|data|sft|dpo|grpo)\.(\w+)`", README)
    assert len(named) > 10 and [f"{file}.{name}" for file, name in named if name != "py" and not hasattr(stages[file], name)] == []
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    differences = README[README.index("## Differences"):README.index("## Limitations")]
    asked = set(re.findall(r"`(test_\w+)`", differences))
    assert len(asked) >= 10 and asked - set(re.findall(r"^def (test_\w+)", tests, re.M)) == set()
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])
    for page in PAGES.values():
        spans = [code for code in re.findall(r"`([^`\n]*)`", page) if not code.startswith(("vllm", "pip", "--resume_", "--use_", "--sp_"))]   # other people's
        options = {option for code in spans for option in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", code)}
        options -= {"nproc"}
        missing = [name for name in options if f'"--{name}"' not in sources and f'"--{name.removeprefix("no-")}"' not in sources]
        assert len(options) >= 8 and missing == [], missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """Files and pictures, and the headings of this page and of others."""
    links = re.findall(r"\]\(((?!http)[^)]*)\)", PAGES[path])
    assert len(links) > 3
    for link in links:
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text() if target.is_file() else (target / "README.md").read_text(), re.M)
            anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, link


def test_the_readme_is_short_and_its_code_is_named():
    assert len(README.encode()) <= 18 * 1024 and 200 <= README.count("\n") <= 250
    assert len(re.findall(r"```python\n# \w+\.py\n", README)) == README.count("```python") == 4
