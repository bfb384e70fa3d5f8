"""Never train silently wrong: each run below gives the right result or one clear error, in time."""
import json
import math
import os
import re
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from PIL import Image
from torch import nn

import data
import dpo
import grpo
import sft
from conftest import ROOT
from test_sft import rows
from tiny_pipelines import DIFFUSION, FAMILIES, PARTLY, REFUSED, make

CPU = torch.device("cpu")
FLOWS = {**FAMILIES, **PARTLY, **REFUSED}
STAGES = {"sft": (sft, "images.jsonl"), "dpo": (dpo, "pairs.jsonl"), "grpo": (grpo, "prompts.txt")}
EDITORS = ("FLUX.1 Kontext", "Qwen-Image-Edit", "Wan image-to-video")
LOAD = """
import torch
from data import load_pipeline
print(type(load_pipeline("editor", torch.device("cpu"))).__name__)
"""
BRIGHT = """
import numpy as np
def bright(media, prompts):
    return [float(np.asarray(frames[0]).mean()) for frames in media]
"""


def write_files(folder, num_frames):
    """Prompts of two lengths, media and a pair for them, and a reward without a judge."""
    media = []
    for name, color in (("a", "red"), ("b", "navy")):
        (folder / name).mkdir(exist_ok=True)
        for k in range(num_frames):
            Image.new("RGB", (32, 32), color).save(folder / name / f"{k}.png")
        media.append(f"{name}/0.png" if num_frames == 1 else name)
    kind = "image" if num_frames == 1 else "video"
    prompts = ["a cat", "a dog on a cube"]
    ones = [{"prompt": prompt, f"{kind}s": media[:1]} for prompt in prompts]
    pairs = [{"prompt": p, f"{kind}s": media, "winner": f"{kind.title()} 1"} for p in prompts]
    data.write_jsonl(folder / "images.jsonl", ones)
    data.write_jsonl(folder / "pairs.jsonl", pairs)
    (folder / "prompts.txt").write_text("\n".join(prompts))
    (folder / "reward.py").write_text(BRIGHT)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(stage, pipeline, call, words...): what one step of the stage prints and logs. The
    pipeline comes from memory and is not saved."""
    def run(stage, pipe, call, *words):
        module, file = STAGES[stage]
        write_files(tmp_path, data.num_frames_of(pipe, call))
        pipe.call_args = {**call, "num_inference_steps": 4}
        replace(monkeypatch, "load_pipeline", lambda *args, **kwargs: pipe)
        replace(monkeypatch, "save_generator", lambda *args: None)
        task = ["--task", "generator"]
        if stage == "grpo":
            task = ["--reward", f"{tmp_path}/reward.py:bright", "--group-size", "2",
                    "--num-prompts", "2", "--sde-steps", "2", "--eval-every", "0"]
        module.main([*task, "--model", "tiny", "--data", f"{tmp_path}/{file}",
                     "--eval-data", f"{tmp_path}/prompts.txt", "--watch", "none", "--no-bf16",
                     "--lora-rank", "2", "--batch-size", "2", "--max-steps", "1",
                     "--warmup-steps", "1", "--lr", "1e-2", "--out", f"{tmp_path}/run", *words])
        return capsys.readouterr().out, rows(tmp_path / "run")[-1]
    return run


@pytest.fixture
def at_once(monkeypatch):
    """What takes long must not begin: a refusal comes before it."""
    def too_late(*args, **kwargs):
        raise AssertionError("too late: the long work has begun")
    for name in ("evaluate_samples", "encode_records", "sample_media", "load_or_sample"):
        replace(monkeypatch, name, too_late)


def replace(monkeypatch, name, function):
    for module in (sft, dpo, grpo):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, function)


def driven(family):
    pipe, call = make(family)
    return data.drive(pipe, CPU), call


# ---------------------------------------------------------------- families

@pytest.mark.parametrize("family", [*PARTLY, "Sana video"])
def test_what_grpo_drives_starts_at_ratio_1_and_moves(family, run):
    """Latents written in place, times that are no 1000 sigma, conditioning that is drawn."""
    said, row = run("grpo", *driven(family))
    assert "max |ratio - 1| of a trial rollout: 0" in said and row["ratio_error"] == 0
    assert "It takes Euler steps, held-out samples those of FlowMatchEuler" in said
    moved = re.search(r"the first rollout moved means by at most (\S+) std", said)
    assert float(moved[1]) > 0


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("family", ["FLUX.1", "Chroma", "Sana video", "AuraFlow"])
def test_what_sft_and_dpo_train(family, stage, run):
    """Pipelines whose call takes one noise level are trained on one sample by one."""
    said, row = run(stage, *driven(family))
    assert ("one by one" in said) == (family == "AuraFlow")
    assert row["grad_norm"] > 0
    if stage == "dpo":                               # the policy equals the reference
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)


STRENGTH = "schedule says 1000.0: leave out `strength`"
TIMES = "(?s)tells its denoiser .* than 1000 sigma"
SHAPE = "is predicted for latents"
WORDS = {
    ("CogView4", "sft"): TIMES,
    ("CogView4", "dpo"): TIMES,
    ("PRX", "sft"): "guidance_scale has to be >= 1.0 but is 0.0",
    ("PRX", "dpo"): "guidance_scale has to be >= 1.0 but is 0.0",
    ("FLUX.1 image-to-image", "sft"): STRENGTH,
    ("FLUX.1 image-to-image", "dpo"): STRENGTH,
    ("FLUX.1 image-to-image", "grpo"): STRENGTH,
    ("Cosmos 2", "sft"): TIMES,
    ("Cosmos 2", "dpo"): TIMES,
    ("Cosmos 2", "grpo"): r"(?s)noise levels .*must fall within \[0, 1\]",
    ("HiDream", "sft"): SHAPE,
    ("HiDream", "grpo"): SHAPE,
    ("Kandinsky 5 as released", "grpo"): "latents of shape .* but this call makes others",
    ("SD1.5", "grpo"): "predicts epsilon: it is no flow",
}


@pytest.mark.parametrize("family, stage", WORDS)
def test_what_is_not_trained_is_refused_at_once_with_the_reason(family, stage, run, at_once):
    with pytest.raises((ValueError, RuntimeError), match=WORDS[family, stage]):
        run(stage, *driven(family))


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_that_reach_nothing_are_refused(stage, run, at_once):
    """The last block's text stream of Qwen-Image is left over."""
    with pytest.raises((ValueError, RuntimeError), match="not reach .*see --targets"):
        run(stage, *driven("Qwen-Image"), "--targets", r"blocks\.1\.(txt_mlp|attn\.to_add_out)")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_whose_adapters_are_not_all_reached(stage, run, tmp_path):
    """Its checkpoint holds a state for each, those of the last block's text stream too."""
    words = ["--targets", r"blocks\.1\.", "--max-steps", "3", "--save-every", "2"]
    _, whole = run(stage, *driven("Qwen-Image"), *words)
    shutil.rmtree(tmp_path / "run/step_000003")
    _, again = run(stage, *driven("Qwen-Image"), *words, "--resume")
    assert again["step"] == 3 and again["loss"] == whole["loss"] and again["grad_norm"] == whole["grad_norm"] > 0


def test_a_first_step_that_changes_no_sample_stops_the_run(run, monkeypatch):
    """Adapters whose update is lost get gradients of 0."""
    monkeypatch.setattr(sft.LoRALinear, "forward", lambda self, x: self.base(x) + 0 * (
        x @ self.lora_A.T @ self.lora_B.T))
    with pytest.raises(RuntimeError, match="the first rollout has changed no sample"):
        run("grpo", *driven("FLUX.1"))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_weights_without_gradients_stop_the_run(stage, run):
    """HiDream's experts get none where its config forces the output of inference."""
    pipe, call = make("HiDream")
    config = {**pipe.transformer.config, "force_inference_output": True}
    pipe.transformer = type(pipe.transformer)(**config)
    with pytest.raises(RuntimeError, match="34% of the .*weights"):
        run(stage, data.drive(pipe, CPU), call)


def test_gradient_checkpointing_that_predicts_something_else_is_refused(run, at_once):
    """Chroma's single blocks lose their attention mask by it."""
    for stage in STAGES:
        with pytest.raises((ValueError, RuntimeError), match=r"--grad-ckpt|ratio - 1"):
            run(stage, *driven("Chroma"), "--grad-ckpt")


# ---------------------------------------------------------------- default adapters

@pytest.mark.parametrize("family", [*FLOWS, *DIFFUSION])
def test_default_adapters_reach_the_blocks_and_say_so(family, capsys):
    pipe, _ = make(family)
    policy = data.denoisers(pipe)
    sft.add_lora(policy, 2)
    said = re.search(r"LoRA on (\d+) of (\d+) linear layers, (\d+)% of block weights",
                     capsys.readouterr().out)
    assert int(said[1]) == len(sft.lora_layers(policy)) and int(said[3]) >= 30
    names = " ".join(sft.lora_layers(policy))
    blocks = {name.rpartition(".")[0] for name in sft.repeated_blocks(policy)}
    assert all(f"{block}." in names for block in blocks if "transformer_blocks" in block)


def test_adapters_on_less_than_30_percent_of_the_blocks_are_refused():
    block = nn.ModuleDict({"norm": nn.Linear(32, 32), "to_q": nn.Linear(16, 16)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    with pytest.raises(ValueError, match="1 of 2 linear layers, .*--targets"):
        sft.add_lora(model, 2)
    sft.add_lora(model, 2, "to_q")


# ---------------------------------------------------------------- guidance, schedules

@pytest.mark.parametrize("family", sorted({*FAMILIES, *PARTLY} - {*EDITORS, "PRX"}))
def test_sft_and_dpo_train_without_guidance(family):
    """The denoiser sees each sample once, whatever the arguments of the call say."""
    pipe, call = driven(family)
    seen = []
    def count(model, args, kwargs):
        seen.append(len([*args, *kwargs.values()][0]))
    for model in data.denoisers(pipe).values():
        model.register_forward_pre_hook(count, with_kwargs=True)
    call = {**call, "prompt": ["a cat"], "num_inference_steps": 2}
    with torch.no_grad():
        data.run_pipeline(pipe, **data.unguided(pipe, call))
    assert seen == [1, 1]                            # one sample at two steps


def skipping_layers():
    """SD3.5's guidance in a window of steps, which it counts."""
    pipe, call = driven("SD3.5")
    return pipe, {**call, "skip_guidance_layers": [0], "skip_layer_guidance_start": .01,
                  "skip_layer_guidance_stop": .4}


def with_momentum():
    """Guidance that remembers the step before; each call of the pipeline begins anew."""
    pipe, call = make("FLUX.1")
    stock, stock_latents, memory = pipe.transformer.forward, pipe.prepare_latents, []

    def forward(*args, **kwargs):
        memory.append(stock(*args, **kwargs)[0])
        return (memory[-1] + .5 * memory[-2] if len(memory) > 1 else memory[-1],)

    def prepare_latents(*args, **kwargs):
        memory.clear()
        return stock_latents(*args, **kwargs)
    pipe.transformer.forward, pipe.prepare_latents = forward, prepare_latents
    return data.drive(pipe, CPU), call


@pytest.mark.parametrize("guided", [skipping_layers, with_momentum])
def test_guidance_with_a_memory_or_a_count_is_refused_but_at_the_first_step(guided, run, at_once):
    with pytest.raises(RuntimeError, match="(?s)before the first update.*guidance that depends"):
        run("grpo", *guided())
    with pytest.raises(AssertionError, match="too late"):       # one step has no steps before
        run("grpo", *guided(), "--sde-steps", "1")


def test_the_first_update_of_every_rollout_looks_again(run, monkeypatch):
    monkeypatch.setattr(grpo, "check_run", lambda *args: None)
    with pytest.raises(RuntimeError, match="(?s)before the first update.*guidance that depends"):
        run("grpo", *with_momentum())


@pytest.mark.parametrize("errors, bf16, is_well", [
    ([0.0, 1e-6], False, True), ([0.0, 1e-4], False, False), ([1e-4], True, True),
    ([.02], True, False), ([0.0, float("nan")], False, False)])
def test_what_the_first_update_may_differ_by(errors, bf16, is_well):
    args = grpo.parse_args(["--bf16"] if bf16 else ["--no-bf16"])
    if is_well:
        assert grpo.check_ratio(errors, args) == max(errors)
    else:
        with pytest.raises(RuntimeError, match="before the first update"):
            grpo.check_ratio(errors, args)


@pytest.mark.parametrize("stage", STAGES)
def test_a_schedule_that_is_set_twice_in_a_call_is_refused(stage, run, at_once):
    pipe, call = driven("FLUX.1")
    stock = pipe.encode_prompt

    def encode_prompt(*args, **kwargs):
        pipe.scheduler.set_timesteps(3, mu=1.0)
        return stock(*args, **kwargs)
    pipe.encode_prompt = encode_prompt
    with pytest.raises(ValueError, match="sets its schedule twice in a call"):
        run(stage, pipe, call)


def test_a_multistep_sampler_is_named_as_rollouts_take_euler_steps(run):
    pipe, call = make("Sana video")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0)
    said, row = run("grpo", data.drive(pipe, CPU), call)
    assert "It takes Euler steps, held-out samples those of DPMSolverMultistep" in said
    assert row["ratio_error"] == 0


def test_frames_by_another_name_are_counted():
    pipe, call = driven("Sana video")
    assert data.num_frames_of(pipe, call) == 9
    assert data.num_frames_of(pipe, {}) == 81                   # the pipeline's default


@pytest.mark.parametrize("family, limit", [("Kandinsky 5", 32), ("FLUX.1", 32), ("PRX", 64)])
def test_long_prompts_are_counted(family, limit, capsys):
    records = [{"prompt": 40 * "long ", "where": "prompts.txt:1"}, {"prompt": "a cat"}]
    pipe, call = driven(family)
    data.report_long_prompts(pipe, records, call)
    assert f"1 of 2 prompts have more than the {limit} tokens" in capsys.readouterr().out


# ---------------------------------------------------------------- two runs

HOLD = """
import sys, time
import sft
sft.lock_folder(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_would_overwrite_its_own_model_is_refused(stage, run, tmp_path, at_once):
    model = tmp_path / "run/model"
    model.mkdir(parents=True)
    with pytest.raises(SystemExit, match="run would overwrite --model: pass another"):
        run(stage, *driven("FLUX.1"), "--model", str(model))
    assert model.is_dir()


def test_what_is_measured_after_training_is_tried_before_it(run, tmp_path, monkeypatch):
    """A typo in --eval-data, and the toy's oracle asked about prompts that it cannot read."""
    replace(monkeypatch, "log_and_save", lambda *args: pytest.fail("a step was trained"))
    for words in (["--eval-data", "typo.txt"], ["--watch", "tests/toy_oracle.py:true"]):
        with pytest.raises(ValueError, match="typo.txt does not exist|no prompt of the toy world"):
            run("sft", *driven("FLUX.1"), *words)


def test_latents_that_go_to_other_ranks_carry_only_themselves(tmp_path):
    """A row of a batch is a view, and pickle writes the whole storage of each view."""
    pipe, call = driven("FLUX.1")
    write_files(tmp_path, 1)
    records = data.read_records(tmp_path / "images.jsonl", "image")
    latents = data.encode_records(pipe, records, call)
    assert len(latents) == len(records) > 1
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in latents)


def test_a_machine_without_git(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    _, row = run("grpo", *driven("FLUX.1"))
    assert row["step"] == 1


def test_a_second_run_with_one_out_is_refused_until_the_first_is_gone(run, tmp_path):
    held = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT,
                            stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout.readline() == "held\n"
        for stage in STAGES:
            with pytest.raises(SystemExit, match="run is in use by another run: pass another"):
                run(stage, *driven("FLUX.1"))
        assert not (tmp_path / "run/log.jsonl").exists()
    finally:
        held.kill()
        held.wait()
    _, row = run("grpo", *driven("FLUX.1"))
    assert row["step"] == 1


def test_a_processor_with_a_video_part_loads_without_torchvision(tmp_path):
    """As released: preprocessor_config.json, and video_preprocessor_config.json beside it. In a process of its own, as other tests have
    loaded processors by then."""
    pipe, _ = make("Qwen-Image-Edit")
    pipe.save_pretrained(tmp_path / "editor")
    folder = tmp_path / "editor/processor"
    image = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "processor_config.json").write_text('{"processor_class": "Qwen2VLProcessor"}')
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps({**image, "video_processor_type": "Qwen2VLVideoProcessor"}))
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.strip().endswith("QwenImageEditPipeline"), done.stderr[-2000:]
