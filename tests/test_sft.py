"""The toolbox, the driver and supervised fine-tuning."""
import builtins
import json
import re
import symtable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import data
import dpo
import sft
from conftest import ROOT
from reward import Candidate, Comparison, LocalJudge, build_messages, load_processor
from toy_models import PIPE_ARGS
from sft import add_lora, adapters_off, generator, run, save_adapter, velocity, whole_state

SMALL = ["--batch-size", "4", "--eval-num", "4", "--max-new-tokens", "8", "--warmup-steps", "1"]


def rows(out):
    return [r for r in map(json.loads, Path(out, "log.jsonl").read_text().splitlines()) if "lr" in r]


def weights(out, step):
    return load_file(Path(out, f"step_{step:06d}", "weights.safetensors"))


def block(name):
    """The text between the rulers of a block of sft.py."""
    return re.search(rf"# =+ {name}\n(.*?)# =+ end of {name}\n", (ROOT / "sft.py").read_text(), re.S)[1]


# ---------------------------------------------------------------- the blocks

def free_names(source):
    """Names a module's text uses, at any depth, without defining or importing them."""
    table, used = symtable.symtable(source, "block", "exec"), set()

    def walk(t):
        for s in t.get_symbols():
            if s.is_referenced() and (s.is_global() or t is table):
                used.add(s.get_name())
        for child in t.get_children():
            walk(child)
    walk(table)
    defined = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    return used - defined - set(dir(builtins))


def test_toolbox_needs_no_name_from_outside():
    assert free_names(block("toolbox")) == set()
    assert free_names("import os\ndef f():\n    return os.path.join(missing)\n") == {"missing"}      # the check can fail


def test_driver_needs_only_the_toolbox():
    assert free_names(block("toolbox") + block("driver")) == set()


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_pasted_blocks_replace_the_import(stage, tmp_path, judge_folder, generator_folder):
    source = (ROOT / f"{stage}.py").read_text()
    pasted = re.sub(r"from sft import \([^)]*\)\n", lambda _: block("toolbox") + block("driver"), source)
    assert "from sft import" in source and "from sft import" not in pasted
    (tmp_path / f"pasted_{stage}.py").write_text(pasted)
    namespace = {"__name__": f"pasted_{stage}", "__file__": str(ROOT / f"{stage}.py")}
    exec(compile(pasted, f"pasted_{stage}.py", "exec"), namespace)
    out = str(tmp_path / "run")
    if stage == "dpo":
        namespace["main"](["--model", judge_folder, "--data", preferences(tmp_path), "--out", out, "--max-steps", "1", *SMALL])
    else:
        namespace["main"](["--model", generator_folder, "--judge", judge_folder, "--out", out, *GRPO])
    assert len(rows(out)) == 1


GRPO = ["--max-steps", "1", "--num-prompts", "2", "--group-size", "3", "--pairs", "all", "--eval-num", "4", "--max-new-tokens", "8",
        "--max-parse-fail", "1", "--warmup-steps", "1", "--eval-every", "0"]


def preferences(folder):
    """A small preference file."""
    world = data.toy_world()
    pairs = [world.Records("train", "trace", 8, 3)[i] for i in range(8)]
    path = Path(folder, "preferences.jsonl")
    data.write_jsonl(path, [{**p, "chosen": p.pop("response"), "rejected": '{"winner":"Image 1"}'} for p in pairs])
    return str(path)


def test_a_judge_keeps_the_words_it_was_asked_for_scores_with(tmp_path):
    """Taught on scores too, it leaves their instruction beside its weights, where a judge reads it; dpo.py hands it on."""
    records = [record for kind in ("trace", "score") for record in data.open_records("toy", kind, 4)]
    data.write_jsonl(tmp_path / "mixed.jsonl", records)
    sft.main(["--data", str(tmp_path / "mixed.jsonl"), "--out", str(tmp_path / "sft"), "--max-steps", "1", *SMALL, "--eval-num", "1"])
    dpo.main(["--model", str(tmp_path / "sft/model"), "--data", preferences(tmp_path), "--out", str(tmp_path / "dpo"), "--max-steps", "1", *SMALL, "--eval-num", "1"])
    judge, candidate = LocalJudge(tmp_path / "dpo/model", device="cpu"), Candidate("a red star", [records[-1]["images"][0]])
    asked = build_messages(candidate, judge.templates[Candidate])[0][0]["content"][-1]["text"]
    assert asked == data.toy_world().SCORE_INSTRUCTION.replace("{prompt}", "a red star") and asked != build_messages(candidate)[0][0]["content"][-1]["text"]
    own = LocalJudge(tmp_path / "sft/model", device="cpu", score_template="How good? {prompt}")
    assert own.templates[Candidate] == "How good? {prompt}" and own.templates[Comparison] == judge.templates[Comparison]


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0), (torch.float32, .02)])
def test_muon_is_torchs_but_for_its_precision(dtype, tolerance):
    """Three steps on wide, tall and square matrices with a decaying weight; torch.optim.Muon multiplies in bfloat16."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((8, 24), (24, 8), (16, 16))]
    found = []
    for make in (lambda ps: sft.Muon(ps, .05, .1), lambda ps: torch.optim.Muon(ps, .05, .1, adjust_lr_fn="match_rms_adamw")):
        params, gradients = [x.clone().requires_grad_() for x in start], torch.Generator().manual_seed(1)
        optimizer = make(params)
        optimizer.dtype = dtype
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=gradients)
            optimizer.step()
        found.append([p.detach() - x for p, x in zip(params, start)])
    for ours, theirs in zip(*found):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


# ---------------------------------------------------------------- LoRA

def judge_inputs(folder):
    records = data.toy_world().Records("train", "trace", 3)
    batch = data.encode(load_processor(folder), list(records), [r["response"] for r in records])
    batch.pop("labels")
    return batch


def test_lora_starts_as_the_base_and_merges_to_the_same(judge_folder):
    model, batch = AutoModelForImageTextToText.from_pretrained(judge_folder).eval(), judge_inputs(judge_folder)
    with torch.no_grad():
        base = model(**batch).logits
        add_lora(model, 4, 8, r"(q|v|up)_proj$")
        assert torch.equal(model(**batch).logits, base)
        for layer in sft.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=.1)
        adapted = model(**batch).logits
        assert (adapted - base).abs().max() > .1
        with adapters_off(model):
            assert torch.equal(model(**batch).logits, base)
        merged = AutoModelForImageTextToText.from_pretrained(judge_folder).eval()
        missing = merged.load_state_dict(whole_state(model), strict=False).missing_keys
        assert missing == ["lm_head.weight"]                                    # tied to the embedding, so it comes once
        torch.testing.assert_close(merged(**batch).logits, adapted, atol=1e-4, rtol=1e-4)


def test_adapter_loads_in_peft_with_equal_logits(judge_folder, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = AutoModelForImageTextToText.from_pretrained(judge_folder).eval(), judge_inputs(judge_folder)
    add_lora(model, 4, 12, r"(q|v)_proj$")                                      # alpha differs from r
    for layer in sft.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=.1)
    save_adapter(tmp_path, {"base_model.model.": model})
    theirs = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(judge_folder), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_of_peft_loads_in_ours_with_equal_logits(rslora, judge_folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=12, use_rslora=rslora, target_modules=r".*language_model.*(q|up)_proj", init_lora_weights=False)
    theirs, batch = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(judge_folder), config).eval(), judge_inputs(judge_folder)
    theirs.save_pretrained(tmp_path)
    ours = AutoModelForImageTextToText.from_pretrained(judge_folder).eval()
    with torch.no_grad():
        base = ours(**batch).logits
        sft.load_adapter(ours, tmp_path)
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-4, rtol=1e-4)
        assert (ours(**batch).logits - base).abs().max() > .1


def test_adapters_that_do_not_fit_are_refused(judge_folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(judge_folder)
    add_lora(model, 4, 4, "q_proj$")
    save_adapter(tmp_path, {"base_model.model.": model})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora.*only plain LoRA"):
        sft.load_adapter(AutoModelForImageTextToText.from_pretrained(judge_folder), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="adapters for layers that Linear does not have"):
        sft.load_adapter(torch.nn.Linear(2, 2), tmp_path)


def test_freeze_leaves_the_named_parts_alone(judge_folder):
    model = AutoModelForImageTextToText.from_pretrained(judge_folder)
    sft.prepare_training(model, sft.start_ranks(), freeze=["vision", "projector"])
    assert {sft.part_of(name) for name in sft.trainable(model)} == {"language"}
    frozen = {name for name, _ in model.named_parameters()} - set(sft.trainable(model))
    assert {sft.part_of(name) for name in frozen} == {"vision", "projector"}
    with pytest.raises(ValueError, match="leaves nothing to train"):
        sft.prepare_training(model, sft.start_ranks(), freeze=["language"])


def test_lora_targets_that_match_nothing_are_refused(judge_folder):
    with pytest.raises(ValueError, match="matches no linear layer"):
        add_lora(AutoModelForImageTextToText.from_pretrained(judge_folder), 4, 4, "nowhere$")


# ---------------------------------------------------------------- the losses

def test_response_loss_is_cross_entropy_of_the_full_logits(judge_folder):
    model = AutoModelForImageTextToText.from_pretrained(judge_folder).eval()
    records = data.toy_world().Records("train", "trace", 4)
    batch = data.encode(load_processor(judge_folder), list(records), [r["response"] for r in records])
    with torch.no_grad():
        loss = sft.response_loss(model, batch)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("trained_head", [True, False])
def test_token_logps_and_gradients_equal_log_softmax(trained_head):
    """In chunks of 3 of 8 tokens, against the whole (N, V) table, with weights on the tokens as DPO's loss has."""
    torch.manual_seed(0)
    hidden, weight, targets, scale = torch.randn(8, 5, requires_grad=True), torch.randn(11, 5), torch.randint(11, (8,)), torch.randn(8)
    weight.requires_grad_(trained_head)
    ours = sft.TokenLogps.apply(hidden, weight, targets, 3, True)
    whole = (hidden @ weight.T).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(ours, whole)
    inputs = (hidden, weight) if trained_head else (hidden,)
    for a, b in zip(*(torch.autograd.grad((x * scale).sum(), inputs) for x in (ours, whole))):
        torch.testing.assert_close(a, b)


def test_output_layers_that_do_more_are_refused(judge_folder):
    model, hidden, targets = AutoModelForImageTextToText.from_pretrained(judge_folder), torch.randn(2, 32), torch.tensor([1, 2])
    model.config.get_text_config().final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="bends its logits .final_logit_softcapping"):
        sft.token_logps(model, hidden, targets)
    model.config.get_text_config().final_logit_softcapping = None
    add_lora(model, 2, 2, "lm_head$")
    with pytest.raises(ValueError, match="Keep adapters off it"):
        sft.token_logps(model, hidden, targets)


def test_gradient_checkpointing_changes_no_number(judge_folder, tmp_path):
    losses = {}
    for option in ("--no-grad-ckpt", "--grad-ckpt"):
        sft.main(["--model", judge_folder, "--max-steps", "2", "--no-bf16", "--out", str(tmp_path / option), option, *SMALL])
        losses[option] = [row["loss"] for row in rows(tmp_path / option)]
    assert losses["--grad-ckpt"] == pytest.approx(losses["--no-grad-ckpt"], rel=1e-6)


def test_velocity_is_the_direct_call(generator_folder):
    """The driver's velocity at one noise level per sample equals a call of the transformer written out by hand."""
    pipe = sft.load_pipeline(generator_folder, torch.device("cpu"))
    prompts, x, sigma = ["a red circle", "two blue stars"], torch.randn(2, 9, 32), torch.tensor([.3, .8])
    v = velocity(pipe, x, sigma, prompt=prompts, **PIPE_ARGS)
    embeds, pooled, text_ids = pipe.encode_prompt(prompts, prompts, max_sequence_length=12)
    direct = pipe.transformer(hidden_states=x, timestep=sigma, guidance=None, encoder_hidden_states=embeds, pooled_projections=pooled,
                              txt_ids=text_ids, img_ids=pipe._prepare_latent_image_ids(2, 3, 3, "cpu", x.dtype)).sample
    assert v.requires_grad and torch.equal(v, direct)


def test_encode_media_gives_the_latents_that_the_pipeline_decodes(generator_folder):
    pipe = sft.load_pipeline(generator_folder, torch.device("cpu"))
    world = data.toy_world()
    image = world.Records("train", "image", 1)[0]["images"][0]
    x = sft.encode_media(pipe, [[image]], height=48, width=48)
    assert x.shape == (1, 9, 32)

    def keep(i, latents, v):
        return x
    out = run(pipe, keep, prompt=["a red circle"], **{**PIPE_ARGS, "num_inference_steps": 1}).images[0]
    error = torch.tensor(list(image.tobytes())).float() - torch.tensor(list(out.tobytes())).float()
    assert error.abs().mean() < 8                                               # of 255: what 32 components lose


# ---------------------------------------------------------------- whole runs

@pytest.mark.parametrize("task", ["judge", "generator"])
def test_resumed_run_equals_the_uninterrupted_one(task, tmp_path, capsys):
    out = str(tmp_path / "run")
    args = ["--task", task, "--max-steps", "4", "--save-every", "2", "--data-num", "40", "--out", out, "--seed", "5", *SMALL]
    sft.main(args)
    whole, log = weights(out, 4), rows(out)
    import shutil
    shutil.rmtree(Path(out, "step_000004"))                                     # as if it had been killed after step 2
    sft.main([*args, "--resume"])
    assert {k: torch.equal(v, weights(out, 4)[k]) for k, v in whole.items()} == dict.fromkeys(whole, True)
    assert [(r["step"], r["loss"]) for r in rows(out)] == [(r["step"], r["loss"]) for r in log]
    with pytest.raises(ValueError, match="other options: lr"):
        sft.main([*args, "--resume", "--lr", "1"])


def test_lora_run_writes_adapter_and_merged_model(judge_folder, tmp_path):
    out = tmp_path / "run"
    sft.main(["--model", judge_folder, "--lora-rank", "4", "--max-steps", "2", "--out", str(out), *SMALL])
    assert (out / "adapter" / "adapter_model.safetensors").exists() and (out / "curves.png").exists() and (out / "verdict.png").exists()
    assert AutoModelForImageTextToText.from_pretrained(out / "model") is not None
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 4
    sft.main(["--model", judge_folder, "--adapter", str(out / "adapter"), "--no-merge", "--max-steps", "1", "--out", str(tmp_path / "on"), *SMALL])
    assert (tmp_path / "on" / "adapter" / "adapter_model.safetensors").exists() and not (tmp_path / "on" / "model").exists()


def test_generator_adapter_loads_in_diffusers_with_equal_images(generator_folder, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "run"
    sft.main(["--task", "generator", "--model", generator_folder, "--lora-rank", "4", "--lora-alpha", "8", "--lr", ".05", "--max-steps", "3",
              "--data-num", "40", "--out", str(out), "--pipe-arg", *(f"{k}={v}" for k, v in PIPE_ARGS.items()), *SMALL])
    ask = dict(prompt="a red circle", output_type="np", **PIPE_ARGS)
    ours = sft.diffusers.DiffusionPipeline.from_pretrained(out / "model")
    theirs = sft.diffusers.DiffusionPipeline.from_pretrained(generator_folder)
    base = theirs(**ask, generator=generator(1)).images
    theirs.load_lora_weights(str(out / "adapter"))
    merged, loaded = ours(**ask, generator=generator(1)).images, theirs(**ask, generator=generator(1)).images
    assert abs(merged - base).max() > .002 and abs(merged - loaded).max() < 1e-4
