"""The toolbox, the driver and supervised fine-tuning."""
import builtins
import json
import re
import shutil
import symtable
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from transformers import AutoModelForImageTextToText

import data
import dpo
import sft
import toy_world
from conftest import ROOT
from data import denoisers, load_pipeline, predict, run_pipeline, seeded_generator, seeded_noise
from reward import Candidate, Comparison, LocalJudge, build_messages, load_processor
from sft import add_lora, disable_lora

PIPE_ARGS = {"height": 48, "width": 48, "max_sequence_length": 12, "num_inference_steps": 10}


def small(folder, task="judge"):
    """Options of a run that lasts seconds, on the files of the fixture toy_folder."""
    names = {"judge": ("traces.jsonl", "pairs_test.jsonl"), "generator": ("images.jsonl", "prompts_test.txt")}[task]
    return ["--task", task, "--data", f"{folder}/{names[0]}", "--eval-data", f"{folder}/{names[1]}",
            "--batch-size", "4", "--warmup-steps", "1"]


def rows(out):
    """The log's rows of steps; of a step that was repeated, the last."""
    lines = Path(out, "log.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return list({row["step"]: row for row in found if "step" in row}.values())


def state(out, step):
    """What a checkpoint holds: {"weights": {...}, "optimizers": {...}}."""
    return _load_state_dict_from_keys(checkpoint_id=str(Path(out, f"step_{step:06d}")))


def weights(out, step):
    return state(out, step)["weights"]


def preferences(folder):
    """A small preference file."""
    path = Path(folder, "preferences.jsonl")
    records = []
    for trace in toy_world.Records("train", "trace", 8, 3):
        record = {"prompt": trace["prompt"], "images": trace["images"], "chosen": trace["response"]}
        records.append({**record, "rejected": '{"winner":"Image 1"}'})
    data.write_jsonl(path, records)
    return str(path)


def block(title, end, file="sft.py"):
    """The text of a part of a file from a heading on."""
    text = (ROOT / file).read_text()
    return text[text.index(f"# ========== {title}:"):text.index(end)]


def imports(file="sft.py", end="DEFAULTS = "):
    """The import statements of a file."""
    text = (ROOT / file).read_text()
    return text[text.index("import argparse"):text.index(end)]


# ---------------------------------------------------------------- the blocks

def free_names(source):
    """Names a module's text uses, at any depth, without defining or importing them."""
    table = symtable.symtable(source, "block", "exec")
    used = set()

    def walk(t):
        for s in t.get_symbols():
            if s.is_referenced() and (s.is_global() or t is table):
                used.add(s.get_name())
        for child in t.get_children():
            walk(child)

    walk(table)
    defined = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    return used - defined - set(dir(builtins)) - {"__file__"}


def test_toolbox_and_driver_need_nothing_of_what_opens_their_files():
    """Imports and toolbox of sft.py make a module, which uses no name of the stage; the driver of data.py uses one of the records' names."""
    assert free_names(imports() + block("Toolbox", 'if __name__ == "__main__"')) == set()
    assert free_names(imports("data.py", "KINDS = ") + block("Driver", "# ---------- a judge's accuracy", "data.py")) == {"source_images"}
    assert free_names("import os\ndef f():\n    return os.path.join(missing)\n") == {"missing"}     # the check can fail


@pytest.mark.parametrize("stage, more", [("dpo", {"add_noise"}), ("grpo", set())])
def test_the_pasted_toolbox_replaces_the_import(stage, more):
    """A stage with imports and toolbox of sft.py pasted over its import of them has all names that it uses, but what it shares with stage 1."""
    source = (ROOT / f"{stage}.py").read_text()
    pasted = re.sub(r"from sft import \([^)]*\)\n", lambda _: imports(), source)
    pasted += block("Toolbox", 'if __name__ == "__main__"')
    assert "from sft import" in source and "from sft import" not in pasted
    assert free_names(pasted) == more


def test_a_judge_keeps_the_words_it_was_asked_for_scores_with(judge_folder, toy_folder, tmp_path):
    """A judge with a score template beside its weights hands it on through both stages; an option overrides it."""
    shutil.copytree(judge_folder, tmp_path / "judge")
    (tmp_path / "judge/score_template.txt").write_text("Rate the image for: {prompt}")
    options = [*small(toy_folder), "--max-steps", "1"]
    sft.main([*options, "--model", str(tmp_path / "judge"), "--out", str(tmp_path / "sft")])
    dpo.main([*options, "--model", str(tmp_path / "sft/model"), "--data", preferences(tmp_path), "--out", str(tmp_path / "dpo")])
    judge = LocalJudge(tmp_path / "dpo/model", device="cpu")
    candidate = Candidate("a red star", toy_world.Records("train", "image", 1)[0]["images"])
    text = build_messages(candidate, judge.templates[Candidate])[0][0]["content"][-1]["text"]
    assert text == "Rate the image for: a red star"
    own = LocalJudge(tmp_path / "sft/model", device="cpu", score_template="How good? {prompt}")
    assert own.templates[Candidate] == "How good? {prompt}" and own.templates[Comparison] == judge.templates[Comparison]


# ---------------------------------------------------------------- optimizers

@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0), (torch.float32, .02)])
def test_muon_is_torchs_but_for_its_precision(dtype, tolerance, monkeypatch):
    """Three steps on wide, tall and square matrices, two of one shape, with a decaying weight; torch.optim.Muon multiplies in bfloat16."""
    monkeypatch.setattr(sft, "has_bf16", lambda: dtype == torch.bfloat16)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((8, 24), (24, 8), (16, 16), (8, 24))]
    found = []
    for make in (lambda ps: sft.Muon(ps, {"lr": 0.0, "weight_decay": .1}), lambda ps: torch.optim.Muon(ps, .05, .1, adjust_lr_fn="match_rms_adamw")):
        params, gradients = [x.clone().requires_grad_() for x in start], torch.Generator().manual_seed(1)
        optimizer = make(params)
        optimizer.param_groups[0]["lr"] = .05
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=gradients)
            optimizer.step()
        found.append([p.detach() - x for p, x in zip(params, start)])
    for ours, theirs in zip(*found):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


# ---------------------------------------------------------------- LoRA

def judge_inputs(folder):
    records = toy_world.Records("train", "trace", 3)
    batch = data.encode(load_processor(folder), list(records), [r["response"] for r in records])
    batch.pop("labels")
    return batch


def test_lora_starts_as_the_base_and_merges_to_the_same(judge_folder, tmp_path):
    model, batch = AutoModelForImageTextToText.from_pretrained(judge_folder).eval(), judge_inputs(judge_folder)
    with torch.no_grad():
        base = model(**batch).logits
        add_lora(model, 4, r"(q|v|up)_proj$")
        assert torch.equal(model(**batch).logits, base)
        for layer in sft.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=.1)
        adapted = model(**batch).logits
        assert (adapted - base).abs().max() > .1
        with disable_lora():
            assert torch.equal(model(**batch).logits, base)
        sft.save_merged(model, tmp_path / "merged")
        assert torch.equal(model(**batch).logits, adapted)                      # saving leaves the adapters
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**batch).logits, adapted, atol=1e-4, rtol=1e-4)


def test_adapter_loads_in_peft_with_equal_logits(judge_folder, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = AutoModelForImageTextToText.from_pretrained(judge_folder).eval(), judge_inputs(judge_folder)
    add_lora(model, 4, r"(q|v)_proj$")
    for layer in sft.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=.1)
    args = sft.parse_args(["--out", str(tmp_path), "--lora-rank", "4"])
    sft.save_adapter(args, model, "base_model.model.", "adapter_model.safetensors")
    base = AutoModelForImageTextToText.from_pretrained(judge_folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)


def test_adapters_go_on_the_linear_layers_of_the_language_models_blocks(judge_folder, capsys):
    model = AutoModelForImageTextToText.from_pretrained(judge_folder)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    add_lora(model, 2)
    names = set(sft.lora_layers(model))
    assert names == {n for n in linear if "language_model.layers." in n} and len(names) == 14       # 7 in each of 2 blocks
    assert f"LoRA on 14 of {len(linear)} linear layers" in capsys.readouterr().out


def test_adapters_go_on_all_linear_layers_of_a_generators_blocks_but_norms(generator_folder):
    policy = denoisers(load_pipeline(generator_folder, torch.device("cpu")))
    linear = {n for n, m in policy.named_modules() if isinstance(m, torch.nn.Linear)}
    add_lora(policy, 2)
    names = set(sft.lora_layers(policy))
    blocks = {n for n in linear if "transformer_blocks." in n}                  # double and single
    assert names == {n for n in blocks if ".norm" not in n} and len(names) == 34 and len(blocks) == 40
    assert {"transformer.single_transformer_blocks.1.proj_mlp", "transformer.transformer_blocks.0.attn.add_q_proj"} <= names


def test_targets_choose_what_trains_and_are_refused_where_they_match_nothing(judge_folder):
    def prepared(*options):
        model = AutoModelForImageTextToText.from_pretrained(judge_folder)
        args = sft.parse_args(["--targets", *options])
        sft.prepare_training(model, args, torch.device("cpu"))
        return {name for name, p in model.named_parameters() if p.requires_grad}

    assert {name.rpartition(".")[2] for name in prepared("q_proj$", "--lora-rank", "2")} == {"lora_A", "lora_B"}
    with pytest.raises(ValueError, match="--targets chooses the layers with adapters: pass --lora-rank"):
        prepared("q_proj$")
    with pytest.raises(ValueError, match="LoRA on 0 of .* linear layers.*--targets"):
        prepared("nowhere", "--lora-rank", "2")


# ---------------------------------------------------------------- the losses

def test_response_loss_is_cross_entropy_of_the_full_logits(judge_folder):
    model = AutoModelForImageTextToText.from_pretrained(judge_folder).eval()
    records = toy_world.Records("train", "trace", 4)
    batch = data.encode(load_processor(judge_folder), list(records), [r["response"] for r in records])
    with torch.no_grad():
        loss = sft.response_loss(model, batch)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    labels = batch["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("trained_head", [True, False])
def test_token_logps_and_gradients_equal_log_softmax(trained_head, judge_folder):
    """In chunks, against the whole (N, V) table, with weights on the tokens as DPO's loss has."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(judge_folder)
    weight = model.get_output_embeddings().weight.requires_grad_(trained_head)
    hidden = torch.randn(300, weight.shape[1], requires_grad=True)
    targets, scale = torch.randint(len(weight), (300,)), torch.randn(300)
    ours = sft.TokenLogps.apply(hidden, weight, targets, 100)
    torch.testing.assert_close(ours, sft.token_logps(model, hidden, targets))       # in one chunk
    full = (hidden @ weight.T).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(ours, full)
    inputs = (hidden, weight) if trained_head else (hidden,)
    for a, b in zip(*(torch.autograd.grad((x * scale).sum(), inputs) for x in (ours, full))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_output_layers_that_do_more_are_refused(judge_folder):
    model = AutoModelForImageTextToText.from_pretrained(judge_folder)
    hidden, targets = torch.randn(2, 32), torch.tensor([1, 2])
    model.config.get_text_config().final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="rescales its logits by final_logit_softcapping"):
        sft.token_logps(model, hidden, targets)
    model.config.get_text_config().final_logit_softcapping = None
    add_lora(model, 2, "lm_head$")
    with pytest.raises(ValueError, match="no adapter"):
        sft.token_logps(model, hidden, targets)


def test_activation_checkpointing_changes_no_number(judge_folder, toy_folder, tmp_path):
    losses = {}
    for option in ("--no-grad-ckpt", "--grad-ckpt"):
        sft.main([*small(toy_folder), "--model", judge_folder, "--max-steps", "2", "--no-bf16", "--out", str(tmp_path / option), option])
        losses[option] = [row["loss"] for row in rows(tmp_path / option)]
    assert losses["--grad-ckpt"] == pytest.approx(losses["--no-grad-ckpt"], rel=1e-6)


# ---------------------------------------------------------------- the driver

def test_prediction_is_the_direct_call(generator_folder):
    """The driver's prediction at one noise level per sample equals a call of the transformer written out by hand."""
    pipe = load_pipeline(generator_folder, torch.device("cpu"))
    prompts, x, sigma = ["a red circle", "two blue stars"], torch.randn(2, 9, 32), torch.tensor([.3, .8])
    t = sigma * pipe.scheduler.config.num_train_timesteps
    v = predict(pipe, x, t, prompt=prompts, **PIPE_ARGS)
    embeds, pooled, text_ids = pipe.encode_prompt(prompts, prompts, max_sequence_length=12)
    direct = pipe.transformer(hidden_states=x, timestep=t / 1000, guidance=None, encoder_hidden_states=embeds, pooled_projections=pooled,
                              txt_ids=text_ids, img_ids=pipe._prepare_latent_image_ids(2, 3, 3, "cpu", x.dtype)).sample
    assert v.requires_grad and torch.equal(v, direct)


def test_encode_media_gives_the_latents_that_the_pipeline_decodes(generator_folder):
    pipe = load_pipeline(generator_folder, torch.device("cpu"))
    image = toy_world.Records("train", "image", 1)[0]["images"][0]
    x = data.encode_media(pipe, [[image]], PIPE_ARGS)
    assert x.shape == (1, 9, 32)
    with torch.no_grad():
        out = run_pipeline(pipe, lambda i, latents, v: x, prompt=["a red circle"], **{**PIPE_ARGS, "num_inference_steps": 1}).images[0]
    error = torch.tensor(list(image.tobytes())).float() - torch.tensor(list(out.tobytes())).float()
    assert error.abs().mean() < 8                                               # of 255: what 32 components lose


@pytest.mark.parametrize("family", ["SD1.5", "SD2.1"])
def test_generators_that_predict_noise_or_v_are_trained(family, tmp_path, toy_folder):
    """The first loss is that of direct calls of the UNet on diffusers' own noised latents and targets; other predictions are refused."""
    from tiny_pipelines import BETAS, make
    pipe, call = make(family)
    pipe.save_pretrained(tmp_path / "sd")
    args = [*small(toy_folder, "generator"), "--model", str(tmp_path / "sd"), "--out", str(tmp_path / "run"), "--no-bf16", "--watch", "none",
            "--max-steps", "1", "--pipe-args", json.dumps({**call, "num_inference_steps": 2})]
    sft.main(args)
    records, ddpm, errors = data.read_records(f"{toy_folder}/images.jsonl", "image"), sft.diffusers.DDPMScheduler(**BETAS), []
    for i in data.batch_indices(len(records), 4, 0, 0):
        x0 = torch.stack(data.encode_records(pipe, [records[i]], call))
        noise, t = seeded_noise(x0.shape[1:], 0, 0, i)[None], torch.randint(1000, (1,), generator=seeded_generator(0, 0, i, "t"))
        embeds, _ = pipe.encode_prompt(records[i]["prompt"], "cpu", 1, False)
        with torch.no_grad():
            prediction = pipe.unet(ddpm.add_noise(x0, noise, t), t, encoder_hidden_states=embeds).sample
        target = noise if family == "SD1.5" else ddpm.get_velocity(x0, noise, t)
        errors.append((prediction - target).pow(2).mean().item())
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx(sum(errors) / 4, rel=1e-4)
    config = tmp_path / "sd/scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(ValueError, match="predicts 'sample': expected epsilon, v_prediction"):
        sft.main(args)


# ---------------------------------------------------------------- whole runs

@pytest.mark.parametrize("task", ["judge", "generator"])
def test_resumed_run_equals_the_uninterrupted_one(task, toy_folder, tmp_path):
    out = str(tmp_path / "run")
    args = [*small(toy_folder, task), "--model", f"{toy_folder}/{task}", "--max-steps", "4", "--save-every", "2", "--out", out, "--seed", "5"]
    if task == "judge":
        shorten(toy_folder, tmp_path)
        args[args.index(f"{toy_folder}/judge")] = str(tmp_path / "judge")
    sft.main(args)
    whole, log = weights(out, 4), rows(out)
    shutil.rmtree(Path(out, "step_000004"))                                     # as if it had been killed after step 2
    sft.main([*args, "--resume"])
    resumed = weights(out, 4)
    assert len(whole) > 10 and {k: torch.equal(v, resumed[k]) for k, v in whole.items()} == dict.fromkeys(whole, True)
    assert [(r["step"], r["loss"]) for r in rows(out)] == [(r["step"], r["loss"]) for r in log]
    with pytest.raises(ValueError, match="other options: lr"):
        sft.main([*args, "--resume", "--lr", "1"])


def shorten(toy_folder, path):
    """A copy of the toy judge, whose untrained verdicts end after 8 tokens."""
    shutil.copytree(f"{toy_folder}/judge", path / "judge")
    config = path / "judge/generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_new_tokens": 8}))


def test_a_run_trains_what_it_says(judge_folder, toy_folder, tmp_path):
    """All weights of the judge but the tokenizer's unused ones move, the loss falls, and the saved model is the trained one."""
    out = tmp_path / "run"
    sft.main([*small(toy_folder), "--model", judge_folder, "--max-steps", "8", "--out", str(out)])
    losses = [row["loss"] for row in rows(out)]
    assert losses[-1] < losses[0]
    before = AutoModelForImageTextToText.from_pretrained(judge_folder).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(out / "model").state_dict()
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert unmoved == [] or all("bias" in name for name in unmoved), unmoved
    saved = weights(out, 8)
    assert all(torch.equal(saved[name], after[name]) for name in saved)


def test_lora_run_writes_adapter_and_merged_model(judge_folder, toy_folder, tmp_path, capsys):
    out = tmp_path / "run"
    sft.main([*small(toy_folder), "--model", judge_folder, "--lora-rank", "4", "--max-steps", "2", "--out", str(out)])
    assert (out / "adapter/adapter_model.safetensors").exists()
    assert capsys.readouterr().out.count("overall: ") == 1  # the first held-out verdict
    assert AutoModelForImageTextToText.from_pretrained(out / "model") is not None
    assert json.loads((out / "adapter/adapter_config.json").read_text())["r"] == 4


def test_generator_adapter_loads_in_diffusers_with_equal_images(generator_folder, toy_folder, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "run"
    sft.main([*small(toy_folder, "generator"), "--model", generator_folder, "--lora-rank", "4", "--lr", ".05",
              "--max-steps", "3", "--out", str(out)])
    ask = dict(prompt="a red circle", output_type="np", **PIPE_ARGS)
    ours = sft.diffusers.DiffusionPipeline.from_pretrained(out / "model", trust_remote_code=True)
    theirs = sft.diffusers.DiffusionPipeline.from_pretrained(generator_folder, trust_remote_code=True)
    base = theirs(**ask, generator=seeded_generator(1)).images
    theirs.load_lora_weights(str(out / "adapter"))
    merged, loaded = ours(**ask, generator=seeded_generator(1)).images, theirs(**ask, generator=seeded_generator(1)).images
    assert abs(merged - base).max() > .002 and abs(merged - loaded).max() < 1e-4


def test_missing_toy_files_name_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="out/toy/judge is not there yet.*tests/toy.py"):
        sft.main([])


def test_half_a_character_in_a_verdict_does_not_stop_the_stage(tmp_path, monkeypatch, capsys):
    class Judge:
        model = torch.nn.Linear(1, 1)

        def __call__(self, questions):
            return ['{"winner": "Image 1", "reason": "\\ud83d"}'] * len(questions)
    pair = {"prompt": "a cat", "images": [Image.new("RGB", (4, 4))] * 2, "winner": "Image 1"}
    options = {}
    monkeypatch.setattr(sft, "LocalJudge", lambda folder, **given: options.update(given) or Judge())
    monkeypatch.setattr(sft, "read_records", lambda path, kind: [pair])
    (tmp_path / "words.txt").write_text("Compare: {prompt}")
    args = sft.parse_args(["--eval-data", "pairs.jsonl", "--judge-batch", "3", "--max-new-tokens", "9",
                           "--template", str(tmp_path / "words.txt")])
    assert sft.evaluate_folder("judge", args, torch.device("cpu"))["failures"] == 0
    assert "overall: 1 wins. ?\n" in capsys.readouterr().out
    assert options == {"device": torch.device("cpu"), "batch_size": 3, "max_new_tokens": 9, "template": "Compare: {prompt}"}


def test_pages_show_8_frames_of_a_long_clip(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (4, 4), (k, 0, 0)) for k in range(20)]
    monkeypatch.setattr(sft, "sample_media", lambda *args: [frames])
    (tmp_path / "prompts.txt").write_text("a cat\n")
    args = sft.parse_args(["--task", "generator", "--eval-data", f"{tmp_path}/prompts.txt", "--watch", "none", "--out", str(tmp_path)])
    pipe = types.SimpleNamespace(device=torch.device("cpu"))
    media, _ = sft.evaluate_samples(pipe, args, {})
    sft.evaluate_samples(pipe, args, {}, media)
    assert [(tmp_path / name).read_text().count("<img") for name in ("samples.html", "before_after.html")] == [8, 16]


@pytest.mark.parametrize("weight", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_keeps_small_updates_on_average(weight, dtype, judge_folder, tmp_path):
    """2e-5 is 1/391 of a step of bfloat16 above 1, 1/195 below: so many weights move by a step. In float32 each moves by 2e-5."""
    for size in (0, 1e-5):                           # times rank 2
        model = sft.LocalJudge(judge_folder, device="cpu", dtype=dtype).model
        sft.add_lora(model, 2)
        for layer in sft.lora_layers(model).values():
            nn.init.constant_(layer.base.weight, weight)
            nn.init.constant_(layer.lora_A, 1.0)
            nn.init.constant_(layer.lora_B, size)
        names = [f"{name}.weight" for name in sft.lora_layers(model)]
        sft.save_merged(model, tmp_path / "model")
        saved = load_file(tmp_path / "model/model.safetensors")
        assert {saved[name].dtype for name in names} == {dtype}
        moved = torch.cat([saved[name].flatten().float() - weight for name in names])
        if size == 0:
            assert not moved.any()
        elif dtype == torch.float32:
            torch.testing.assert_close(moved, torch.full_like(moved, 2e-5), atol=2e-7, rtol=0)
        else:
            assert set(moved.tolist()) == {0.0, 2 ** -7 if weight > 0 else 2 ** -8}
            assert moved.mean().item() == pytest.approx(2e-5, rel=.1)


def test_a_verdict_is_printed_while_the_judge_learns_and_changes_nothing(toy_folder, judge_folder, tmp_path, monkeypatch, capsys):
    words = [*small(toy_folder), "--model", judge_folder, "--max-steps", "3", "--max-new-tokens", "8"]
    for place, step in {"silent": 9, "spoken": 2}.items():
        monkeypatch.setattr(sft, "FIRST_VERDICT", step)
        sft.main([*words, "--out", str(tmp_path / place)])
        assert ("after 2 steps the judge says of a held-out pair:\nprompt: " in capsys.readouterr().out) == (step == 2)
    silent, spoken = weights(tmp_path / "silent", 3), weights(tmp_path / "spoken", 3)
    assert all(torch.equal(x, spoken[name]) for name, x in silent.items())
