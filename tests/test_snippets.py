"""The README's code runs as it stands, what it offers for copying works alone in an empty folder, and what it says of memory and options is so."""
import ast
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from PIL import Image

import data
import dpo
import grpo
import reward
import sft
import tiny_pipelines
from conftest import ROOT
from test_sft import GRPO, block, free_names

README = (ROOT / "README.md").read_text()


# ---------------------------------------------------------------- your own judge, reward, generator, data

@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder as the current one, with the README's named pieces of code and three images, dark to bright."""
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README, re.S):
        (tmp_path / name).write_text(text)
    for name, grey in zip("ABC", (0, 51, 255)):
        Image.new("RGB", (48, 48), (grey,) * 3).save(tmp_path / f"{name}.png")
    return tmp_path


def test_your_own_judge_and_reward_improve_a_generator(here, generator_folder, capsys):
    """my_judge.py ranks three images, C before B before A, and then rewards beside brightness.py."""
    reward.main(["rank", "A.png", "B.png", "C.png", "--prompt", "a bright day", "--judge", "my_judge.py:judge", "--json"])
    ranked = json.loads(capsys.readouterr().out)["items"]
    assert [(item["item"], item["win rate"], item["advantage"]) for item in ranked] == [("C.png", 1, 1), ("B.png", .5, 0), ("A.png", 0, -1)]
    shutil.copytree(generator_folder, here / "out/generator-sft/model")
    grpo.main([*GRPO[:-4], "--judge", "my_judge.py:judge", "--reward", "flex:.7,brightness.py:bright:.3", "--max-parse-fail", "0"])
    row = next(row for row in map(json.loads, (here / "out/grpo/log.jsonl").read_text().splitlines()) if row.get("step") == 1)
    assert row["verdicts"] == 6 and row["undecided"] == 0 and row["max_ratio_error"] == 0 and 0 < row["reward/brightness.py:bright"] < 1


def test_your_own_reward_is_a_function_of_media_and_prompts(here):
    bright, = reward.open_rewards("brightness.py:bright")
    media = [reward.load_media(f"{name}.png") for name in "ABC"]
    assert reward.reward_values(bright, media, ["p"] * 3).tolist() == pytest.approx([0, .2, 1])


def test_your_own_generator_starts_at_ratio_1(here, capsys):
    pipe, _ = tiny_pipelines.make("SD3.5")
    pipe.save_pretrained("my-pipeline")
    runpy.run_path("my_generator.py")
    error, gradient = map(float, re.findall(r"(?:ratio - 1\||gradient) ([\d.e+-]+)", capsys.readouterr().out))
    assert error == 0 and gradient > 0


def test_your_own_data_becomes_pairs_that_the_stages_read(here, capsys):
    (here / "votes.csv").write_text("prompt,left,right,vote\na dark day,A.png,C.png,left\na bright day,A.png,C.png,right\nany day,A.png,A.png,tie\n")
    runpy.run_path("my_data.py")
    assert [data.WINNERS[r["winner"]] for r in data.read_records("my_pairs.jsonl", "pair")] == [1, 2, 0]
    data.main(["check", "my_pairs.jsonl"])
    assert "3 pair records, all well formed" in capsys.readouterr().out


# ---------------------------------------------------------------- parts copied into another project

def definitions(path, *names):
    """The text of functions, classes and constants of a file."""
    source = (ROOT / path).read_text()
    nodes = {getattr(node, "name", None) or node.targets[0].id: node for node in ast.parse(source).body
             if hasattr(node, "name") or isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    starts = [min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])]) for node in map(nodes.__getitem__, names)]
    lines = source.split("\n")
    return "\n\n\n".join("\n".join(lines[start - 1:nodes[name].end_lineno]) for start, name in zip(starts, names)) + "\n"


def copied(what):
    """(names, imports) of a row of the README's table of parts to copy."""
    row = next(line for line in README.splitlines() if line.startswith(f"| {what} |"))
    names, imports = row.split(" | ")[1:3]
    return re.findall(r"`(\w+)`", names), "\n".join(re.findall(r"`((?:import|from) [^`]*)`", imports)) + "\n"


def alone(folder, script):
    """The words that a script prints in `folder`, where nothing of ours can be imported but what was copied there."""
    script += "\nimport sys\nassert not {'sft', 'dpo', 'grpo', 'data', 'toy_world'} & {*sys.modules}\n"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_reward_py_alone(tmp_path):
    """0 beats 1 and 2, who tie. A sees it so, B the other way round, C nothing: the category side is dead, and z of (1, 1/4, 1/4) times .3 is left."""
    shutil.copy(ROOT / "reward.py", tmp_path)
    said = alone(tmp_path, """if 1:
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
    assert [float(word) for word in said] == pytest.approx([1, .25, .25, 0, .75, .75, .5, .5, .5, .3 * z, -.15 * z, -.15 * z])


def test_the_dpo_loss_alone(tmp_path):
    """ln 2 where policy and reference agree; margins of 2 and -2 at beta 1/2 give rewards 1 and -1 and the loss ln(1 + exp(-2))."""
    names, imports = copied("the DPO loss")
    (tmp_path / "loss.py").write_text(imports + definitions("dpo.py", *names))
    assert free_names((tmp_path / "loss.py").read_text()) == set()
    said = alone(tmp_path, """if 1:
        import torch
        from loss import dpo_loss
        same, chosen, rejected = torch.tensor([-7.]), torch.tensor([-10.]), torch.tensor([-20.])
        print(dpo_loss(same, same, same, same, beta=.1)[0].item())
        print(*[part.item() for part in dpo_loss(chosen, rejected, chosen - 2, rejected + 2, beta=.5)])
        """)
    assert [float(word) for word in said] == pytest.approx([math.log(2), math.log(1 + math.exp(-2)), 1, -1], abs=1e-6)


def test_lora_alone(tmp_path):
    """y = W x + alpha / r B A x: 2 + 2 * 5 * 3 = 32 with one weight each. In a network: off is the base, merged is unmerged."""
    names, imports = copied("LoRA")
    (tmp_path / "lora.py").write_text(imports + definitions("sft.py", *names))
    assert free_names((tmp_path / "lora.py").read_text()) == set()
    said = alone(tmp_path, """if 1:
        import copy, torch
        from torch import nn
        from lora import LoRALinear, add_lora, adapters_off, lora_layers
        one = LoRALinear(nn.Linear(1, 1, bias=False), rank=1, alpha=2)
        for p, value in ((one.base.weight, 2.), (one.lora_A, 3.), (one.lora_B, 5.)):
            nn.init.constant_(p, value)
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(5, 3)
        base = model(x)
        add_lora(model, rank=2, alpha=4, targets="^[02]$")
        start = model(x)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B)
        with adapters_off(model):
            off = model(x)
        merged = copy.deepcopy(model)
        for name, layer in lora_layers(merged).items():
            layer.base.weight.data = layer.merged_weight()
            merged.set_submodule(name, layer.base)
        gap = lambda a, b: (a - b).abs().max().item()
        print(one(torch.ones(1)).item(), gap(start, base), gap(off, base), gap(merged(x), model(x)), gap(model(x), base))
        """)
    one, start, off, merged, moved = map(float, said)
    assert (one, start, off) == (32, 0, 0) and merged < 1e-5 < .1 < moved


def test_the_driver_alone(tmp_path):
    """The Euler step in a visit gives the stock sampler's latents bit for bit, and a step asked for by itself gives the velocity of the rollout:
    so the ratio of the two densities is 1."""
    _, imports = copied("the driver")
    (tmp_path / "driver.py").write_text(imports + block("driver"))
    assert free_names((tmp_path / "driver.py").read_text()) == {"gather", "save_whole"}                # of two functions, as the README says
    pipe, args = tiny_pipelines.make("FLUX.1")
    pipe.save_pretrained(tmp_path / "pipe")
    said = alone(tmp_path, f"""if 1:
        import torch
        from driver import generator, load_pipeline, run, velocity
        pipe, call = load_pipeline("pipe", torch.device("cpu")), dict(prompt=["a cat"], num_inference_steps=4, **{args})
        seen = []
        def visit(i, x, v):
            seen.append((x, v))
            return x + v * (pipe.scheduler.sigmas[i + 1] - pipe.scheduler.sigmas[i])
        stock = run(pipe, generator=generator(7), output_type="latent", **call)[0]
        ours = run(pipe, visit, generator=generator(7), output_type="latent", **call)[0]
        x, old = seen[2]
        new = velocity(pipe, x, pipe.scheduler.sigmas[2], **call)
        new.square().sum().backward()
        ratio = (-(new - old).square().mean()).exp()
        gradient = sum(p.grad.abs().sum().item() for p in pipe.transformer.parameters() if p.grad is not None)
        print(torch.equal(ours, stock), len(seen), ratio.item() - 1, gradient > 0, stock.std().item() > .1)
        """)
    assert said == ["True", "4", "0.0", "True", "True"]


# ---------------------------------------------------------------- differences from the paper and from the original code

def test_the_papers_values_are_options_and_ours_are_the_defaults():
    ours, theirs = grpo.parse_args([]), grpo.parse_args("--pairs all --std-floor 0 --sde-steps 14 --clip-range 1e-4 --kl 0 --category-weights 1 .7 .7".split())
    assert (ours.pairs, ours.std_floor, ours.sde_steps, ours.epochs, ours.alpha, ours.category_weights) == ("ring:2", .2, 3, 1, .7, [1, 1, 1])
    assert (theirs.pairs, theirs.std_floor, theirs.sde_steps, theirs.clip_range, theirs.kl) == ("all", 0, 14, 1e-4, 0)
    assert dpo.parse_args([]).beta == .3 and dpo.parse_args(["--task", "generator"]).beta == 50


def test_std_floor_keeps_a_nearly_dead_group_quiet():
    """Of the 36 pairs of 9 images, 35 ties and one win: the winner's advantage is 2 without a floor, above the 1.46 of a perfect ranking."""
    pairs = reward.schedule_pairs(9, "all")
    rates = reward.win_rates(pairs, [reward.Verdict(1)] + [reward.Verdict(0)] * 35, 9)
    perfect = reward.win_rates(pairs, [reward.Verdict(1 if i < j else 2) for i, j in pairs], 9)
    loud, quiet, best = (reward.group_advantages(r, std_floor=floor).max().item() for r, floor in ((rates, 0), (rates, .2), (perfect, .2)))
    assert loud == pytest.approx(2, abs=1e-3) and quiet == pytest.approx(.0625 / .2, abs=1e-3) and quiet < 1 < best < loud


def test_a_judge_behind_a_server_sees_every_pixel():
    """As PNG; the original sends JPEG of quality 95, and mp4 of videos."""
    image = Image.frombytes("RGB", (16, 16), bytes(range(256)) * 3)
    back, = reward.load_media(reward.data_url(image))
    assert back.tobytes() == image.tobytes()


def test_the_kl_term_is_not_divided_by_dt(generator_folder):
    """With advantages of 0 the loss is --kl times the divergence, whatever the lengths of the steps."""
    pipe, prompts, call = sft.load_pipeline(generator_folder, torch.device("cpu")), ["a red circle", "a blue star"], data.know_toy_classes(generator_folder)
    args = grpo.parse_args(["--kl", ".5", "--ratio-norm"])
    sft.add_lora(pipe.transformer, 2, 2, args.lora_targets)
    for layer in sft.lora_layers(pipe.transformer).values():
        torch.nn.init.normal_(layer.lora_B)
    _, trajectory = grpo.rollout(pipe, prompts, [(0, 1), (0, 2)], args, **call)
    found = grpo.accumulate_gradients(pipe, trajectory, torch.zeros(2), args, torch.full((2,), .5), prompt=prompts, **call)
    assert found["kl"] > 1e-6 and found["loss"] == pytest.approx(.5 * found["kl"], rel=1e-4)


# ---------------------------------------------------------------- what the README names

def count(model):
    return sum(p.numel() for p in model.parameters()) / 1e9


def test_the_table_of_memory_is_arithmetic_on_counted_parameters():
    """Models of the real sizes without storage, adapters by the stages' own targets, 16 bytes a trained parameter, 2 a frozen one."""
    sizes = dict(d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    text = dict(hidden_size=4096, num_hidden_layers=36, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936)
    with torch.device("meta"):
        judge = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(text_config=text, vision_config=dict(out_hidden_size=4096)))
        flux, wan = diffusers.FluxTransformer2DModel(guidance_embeds=True), diffusers.WanTransformer3DModel()
        t5 = count(transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, **sizes)))
        umt5 = count(transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=256384, **sizes)))
        J, F, W = map(count, (judge, flux, wan))
        adapters = []
        for model, stage in ((judge, sft), (wan, grpo)):
            sft.add_lora(model, 64, 64, stage.parse_args([]).lora_targets)
            adapters.append(sum(p.numel() for p in sft.trainable(model).values()) / 1e9)
    j, w = adapters
    lora = f"LoRA 64 | {J:.2f} | {j:.2f} | 2 x {J:.2f} + 16 x {j:.2f} = {2 * J + 16 * j:.1f} |"
    for cells in (f"| SFT of Qwen3-VL-8B, {lora}", f"| DPO of it, {lora}", f"| {J:.2f} | 16 x {J:.2f} / 8 = {16 * J / 8:.1f} |",
                  f"| {J:.2f} | {J:.2f} | (4 + 16) x {J:.2f} / 16 = {20 * J / 16:.1f} |", f"2 x {J:.2f} = {2 * J:.1f} GB",
                  f"| {F:.2f} | 16 x {F:.2f} / 8 = {2 * F:.1f}; while encoding 4 x {t5:.2f} = {4 * t5:.1f} more |",
                  f"| {W:.2f} | {w:.2f} | 2 x {W:.2f} + 16 x {w:.2f} = {2 * W + 16 * w:.1f}; while encoding 2 x {umt5:.2f} = {2 * umt5:.1f} more |"):
        assert cells in README, cells


def test_functions_tests_options_and_headings_that_the_readme_names_exist():
    stages = {"reward": reward, "data": data, "sft": sft, "dpo": dpo, "grpo": grpo}
    named = re.findall(r"`(reward|data|sft|dpo|grpo)\.(\w+)`", README)
    assert len(named) > 15 and [f"{file}.{name}" for file, name in named if name != "py" and not hasattr(stages[file], name)] == []
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py")), re.M))
    asked = set(re.findall(r"`(test_\w+)`", README))
    assert len(asked) > 25 and asked - defined == set()
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/bench_*.py"), ROOT / "tests/ablations.py"])
    spans = [code for code in re.findall(r"`([^`\n]*)`", README) if not code.startswith(("vllm", "pip", "--resume_", "--use_", "--sp_"))]     # other people's
    options = {option for code in spans for option in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", code)}
    assert len(options) > 40 and [o for o in options if f'"--{o}"' not in sources and f'"--{o.removeprefix("no-")}"' not in sources] == []
    logged = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", README[README.index("## Troubleshooting"):]))
    assert len(logged) >= 6 and [name for name in logged if not re.search(rf"\b{name}\b", sources)] == []
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)$", README, re.M)}
    links = set(re.findall(r"\]\(#([^)]*)\)", README))
    assert len(links) > 10 and links - anchors == set()


def test_files_and_pictures_that_the_readme_links_exist():
    links = re.findall(r"\]\(((?!http|#)[^)]*)\)", README)
    assert len(links) >= 3 and [link for link in links if not (ROOT / link).exists()] == []
