"""The driver on every generator family, as tiny random pipelines: one code path, no table of exceptions."""
import json

import diffusers
import pytest
import torch
from PIL import Image

import data
import grpo
import sft
from test_sft import rows
from tiny_pipelines import FAMILIES, NEGATIVE, make

CPU = torch.device("cpu")
PROMPTS, STEPS = ["a cat", "a dog on a cube", "a dog on a cube"], 4
RECORDS = [{"prompt": prompt} for prompt in PROMPTS]
SEEDS = [(7, 0, i, 0) for i in range(len(PROMPTS))]  # (seed, step, prompt's index, member)
ADVANTAGES = torch.tensor([1., -1., .5])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(the driven pipeline, the arguments of a call)"""
    pipe, args = make(request.param)
    return data.drive(pipe, CPU), {**args, "prompt": PROMPTS, "num_inference_steps": STEPS, "output_type": "pt"}


def options(*extra):
    return grpo.parse_args(["--sde-steps", "2", "--kl", "0", "--no-bf16", *extra])


def policy_gradient(pipe, rollout, advantages, args):
    """The largest |ratio - 1| at the rollout's stochastic steps; gradients are left in the denoisers."""
    errors = []
    for i in range(args.sde_steps):
        mean, std = grpo.mean_at(pipe, rollout, i, args)
        ratio = grpo.policy_ratio(rollout.x[i + 1], mean, rollout.means[i], std)
        losses, _ = grpo.grpo_loss(ratio, advantages, args.clip_range)
        losses.mean().backward()
        errors.append((ratio - 1).abs().max().item())
    return max(errors)


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_media_for_training_have_as_many_frames_as_the_pipeline_makes(family, monkeypatch):
    pipe, call = family
    with torch.no_grad():
        frames = data.frames_of(data.run_pipeline(pipe, **{**call, "output_type": "pil"}))[0]
    num_frames = data.num_frames_of(pipe, call)
    assert len(frames) == num_frames
    field, seen = "images" if num_frames == 1 else "videos", []
    monkeypatch.setattr(data, "encode_media", lambda pipe, media, call: seen.extend(media) or torch.zeros(1))
    data.encode_records(pipe, [{field: [frames]}], call)
    assert seen == [frames]
    with pytest.raises(ValueError, match=f"films.jsonl:3: .* frames, the pipeline makes {num_frames}: num_frames in --pipe-args"):
        data.encode_records(pipe, [{"where": "films.jsonl:3", field: [frames * 2]}], call)


def test_eta_0_is_the_stock_sampler(family):
    pipe, call = family
    generators = [data.seeded_generator(*seed[:-1]) for seed in SEEDS]
    with torch.no_grad():
        stock = data.run_pipeline(pipe, generator=generators, **call)[0]
    rollout = grpo.sample(pipe, RECORDS, SEEDS, options("--eta", "0"), call)
    assert torch.equal(torch.stack([frames[0] for frames in rollout.media]), stock)


def test_the_schedule_is_a_flow_whose_timesteps_the_model_is_told(family):
    """Noise levels fall within [0, 1]; a recorded timestep is the schedule's own, here a thousand times the noise level."""
    pipe, call = family
    rollout = grpo.sample(pipe, RECORDS, SEEDS, options(), call)
    assert rollout.sigmas[-1] == 0 and rollout.sigmas[0] <= 1 and (rollout.sigmas.diff() < 0).all()
    torch.testing.assert_close(rollout.timesteps.float(), 1000 * rollout.sigmas[:-1].float(), atol=.51, rtol=0)


@pytest.mark.parametrize("lora", [True, False])
def test_ratio_is_1_at_the_first_update_and_gradients_arrive(family, lora):
    """With adapters where sft.add_lora puts them by default, and with all weights."""
    pipe, call = family
    policy = data.denoisers(pipe)
    rollout = grpo.sample(pipe, RECORDS, SEEDS, options(), call)
    if lora:
        sft.add_lora(policy, 2)
        for name, model in policy.items():
            blocks = tuple(sft.repeated_blocks(model))
            assert all(layer.startswith(blocks) for layer in sft.lora_layers(model)) and len(sft.lora_layers(model)) > 5
    assert policy_gradient(pipe, rollout, ADVANTAGES, options()) == 0
    arrived = gradients(policy)
    assert sum(gradient.abs().sum().item() for gradient in arrived.values()) > 0
    if lora:
        assert all(".lora_" in name for name in arrived)
        with torch.no_grad(), sft.disable_lora():
            reference, _ = grpo.mean_at(pipe, rollout, 0, options())
        assert torch.equal(reference, grpo.mean_at(pipe, rollout, 0, options())[0].detach())    # B is 0
    policy.zero_grad()
    for name, layer in sft.lora_layers(policy).items():                         # as it was, for the next test
        policy.set_submodule(name, layer.base)
    policy.requires_grad_(True)


def guided_by_hand(name, pipe, x, sigma, args):
    """The velocity of one guided step by direct calls of the denoiser, without the driver."""
    model, num = pipe.transformer, len(PROMPTS)
    negative_prompt = [NEGATIVE] * num
    with torch.no_grad():
        if name == "FLUX.1":
            embeds, pooled, text_ids = pipe.encode_prompt(prompt=PROMPTS, prompt_2=None, device=CPU, max_sequence_length=32)
        elif name == "SD3.5":
            embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
                prompt=PROMPTS, prompt_2=None, prompt_3=None, negative_prompt=negative_prompt, device=CPU, max_sequence_length=32)
        else:
            embeds, negative = pipe.encode_prompt(prompt=PROMPTS, negative_prompt=negative_prompt, max_sequence_length=32)
    if name == "FLUX.1":                             # its guidance is an input, its time runs from 0 to 1
        image_ids = pipe._prepare_latent_image_ids(num, 4, 4, CPU, torch.float32)
        return model(x, timestep=sigma.expand(num), guidance=torch.full((num,), 3.5), pooled_projections=pooled,
                     encoder_hidden_states=embeds, txt_ids=text_ids, img_ids=image_ids)[0]
    t = (1000 * sigma).expand(num)
    if name == "SD3.5":
        both = model(torch.cat([x, x]), timestep=t.repeat(2), encoder_hidden_states=torch.cat([negative, embeds]),
                     pooled_projections=torch.cat([negative_pooled, pooled]))[0]
        away, toward = both.chunk(2)
    else:
        away, toward = (model(x, timestep=t, encoder_hidden_states=e)[0] for e in (negative, embeds))
    return away + args["guidance_scale"] * (toward - away)


@pytest.mark.parametrize("name", ["FLUX.1", "SD3.5", "Wan 2.1"])
@pytest.mark.parametrize("bf16", [False, True])
def test_velocity_and_gradients_equal_a_direct_call(name, bf16):
    pipe, args = make(name)
    data.drive(pipe, CPU)
    shape = {"FLUX.1": (3, 16, 16), "SD3.5": (3, 4, 8, 8), "Wan 2.1": (3, 16, 2, 2, 2)}[name]
    x, sigma, weight = torch.randn(shape), torch.tensor(.6), torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        by_hand = guided_by_hand(name, pipe, x, sigma, args)
    (by_hand.float() * weight).sum().backward()
    expected = gradients(pipe.transformer)
    pipe.transformer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        v = data.predict(pipe, x, 1000 * sigma, prompt=PROMPTS, **args)
    (v.float() * weight).sum().backward()
    torch.testing.assert_close(v, by_hand)
    ours = gradients(pipe.transformer)
    assert len(expected) > 10 and ours.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(ours[key], gradient, **(dict(rtol=1e-2, atol=1e-2) if bf16 else {}))


def test_velocity_takes_a_noise_level_for_each_sample(family):
    """At other noise levels in a batch each sample gets what it gets alone."""
    pipe, call = family
    rollout = grpo.sample(pipe, RECORDS, SEEDS, options(), call)
    call, sigmas, alone = data.unguided(pipe, call), torch.tensor([.9, .5, .5]), []
    one = {"image": call["image"][:1]} if isinstance(call.get("image"), list) else {}
    with torch.no_grad():
        together = data.predict(pipe, rollout.x[1], 1000 * sigmas, **call)
        for i in range(2):
            alone.append(data.predict(pipe, rollout.x[1][i:i + 1], 1000 * sigmas[i], **{**call, "prompt": [PROMPTS[i]], **one}))
    torch.testing.assert_close(together[:2], torch.cat(alone), atol=1e-4, rtol=1e-3)


def test_bf16_autocast_keeps_the_ratio_near_1_and_checkpointing_the_gradients(family):
    pipe, call = family
    policy, args, found = data.denoisers(pipe), options("--bf16"), []
    rollout = grpo.sample(pipe, RECORDS, SEEDS, args, call)
    for recompute in (False, True):
        policy.zero_grad()
        for model in policy.values():
            if recompute:
                model.enable_gradient_checkpointing()
        assert policy_gradient(pipe, rollout, ADVANTAGES, args) < 1e-6
        found.append(list(gradients(policy).values()))
    for model in policy.values():
        model.disable_gradient_checkpointing()
    policy.zero_grad()
    assert len(found[0]) > 5
    torch.testing.assert_close(*found)


def test_samples_are_a_function_of_prompts_and_seeds(family):
    """The same prompts give the same pictures after others in between, which give others."""
    pipe, call = family
    first, other, again = [grpo.sample(pipe, records, SEEDS, options(), call).media
                           for records in (RECORDS, RECORDS[::-1], RECORDS)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again))
    assert not torch.equal(first[0][0], other[0][0])


# ---------------------------------------------------------------- editors

EDITORS = {"FLUX.1 Kontext": 2, "Wan image-to-video": 2, "Qwen-Image-Edit": 1}  # samples of a call with one source


def edits(folder):
    """Prompt records with a source each, red and blue."""
    lines = []
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save(folder / f"{color}.png")
        lines.append(json.dumps({"prompt": "a cat", "source": f"{color}.png"}))
    (folder / "edits.jsonl").write_text("\n".join(lines) + "\n")
    return data.read_records(folder / "edits.jsonl", "prompt")


@pytest.mark.parametrize("name", EDITORS)
def test_source_images_go_along_with_their_prompts(name, tmp_path):
    """Each prompt has an image of its own to edit or animate: another source gives another result."""
    pipe, args = make(name)
    data.drive(pipe, CPU)
    args.pop("image")
    records = edits(tmp_path)
    call = {**args, "num_inference_steps": STEPS, "output_type": "pt"}
    both = data.sample_media(pipe, records, [1, 1], 2, call)
    alone = data.sample_media(pipe, records[1:], [1], 2, call)
    assert not torch.allclose(both[0][0], both[1][0])
    torch.testing.assert_close(both[1][0], alone[0][0])
    (tmp_path / "edits.jsonl").write_text('{"prompt": "a cat", "source": "c.png"}\n')
    with pytest.raises(ValueError, match="edits.jsonl:1: 'c.png' is no file in"):
        data.read_records(tmp_path / "edits.jsonl", "prompt")


@pytest.mark.parametrize("name", EDITORS)
def test_editors_start_at_ratio_1_from_records_with_sources(name, tmp_path):
    """A group of each source, sampled and trained on as grpo.main does."""
    pipe, args = make(name)
    data.drive(pipe, CPU)
    args.pop("image")
    records, settings, media = edits(tmp_path), options("--num-prompts", "2", "--group-size", "2", "--pairs", "all", "--batch-size", str(EDITORS[name])), []
    for seeds in sum(grpo.sample_seeds(2, 5, settings), []):
        rollout = grpo.sample(pipe, records, seeds, settings, {**args, "num_inference_steps": STEPS, "output_type": "pt"})
        assert policy_gradient(pipe, rollout, ADVANTAGES[:len(seeds)], settings) == 0
        media += rollout.media
    assert len(media) == 4 and not torch.allclose(media[0][0], media[2][0])     # the same prompt, another source
    assert sum(gradient.abs().sum().item() for gradient in gradients(pipe.transformer).values()) > 0


def test_several_sources_in_a_call_are_refused_with_what_to_do(tmp_path):
    pipe, args = make("Wan image-to-video")
    data.drive(pipe, CPU)
    settings = options("--group-size", "4", "--batch-size", "8", "--num-prompts", "2")
    message = "--batch-size 8: .*--group-size 4, a divisor where prompts have sources"
    with pytest.raises(ValueError, match=message):
        grpo.check_run(settings, pipe, edits(tmp_path), args, {"flex"})


def run_wan(pipe, args, folder, prompts, *extra):
    """The rows of a run of grpo.py on a saved tiny Wan, rewarded for bright clips of 5 frames."""
    pipe.save_pretrained(folder / "wan")
    (folder / "bright.py").write_text(
        "import numpy as np\ndef bright(media, prompts):\n    assert all(len(frames) == 5 for frames in media)\n"
        "    return [float(np.mean([np.asarray(frame) for frame in frames])) for frames in media]\n")
    (folder / "wan" / "pipe_args.json").write_text(json.dumps({**args, "num_inference_steps": STEPS}))
    grpo.main(["--model", str(folder / "wan"), "--data", str(prompts), "--eval-data", str(prompts), "--watch", "none",
               "--reward", f"{folder}/bright.py:bright", "--sde-steps", "2", "--lora-rank", "2", "--group-size", "2",
               "--num-prompts", "2", "--batch-size", "2", "--max-steps", "2", "--warmup-steps", "1", "--lr", "1e-2",
               "--out", str(folder / "run"), *extra])
    return rows(folder / "run")


def test_a_run_on_prompts_with_sources(tmp_path):
    """Wan image-to-video: groups of two sources, evaluations with the sources of the held-out records; what is not trained is saved, too."""
    pipe, args = make("Wan image-to-video")
    args.pop("image")
    edits(tmp_path)
    first, second = run_wan(pipe, args, tmp_path, tmp_path / "edits.jsonl")
    assert first["ratio_error"] == 0 and first["grad_norm"] > 0 and second["kl"] > 0
    assert (tmp_path / "run" / "model" / "text_encoder" / "config.json").exists()


def test_a_video_generator_is_rewarded_by_its_frames(tmp_path):
    """A whole run on Wan 2.1: the reward sees the 5 frames of a clip; the adapter loads in diffusers."""
    pipe, args = make("Wan 2.1")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cube\n")
    first, second = run_wan(pipe, args, tmp_path, tmp_path / "prompts.txt")
    assert first["ratio_error"] == 0 and second["kl"] > 0 and (tmp_path / "run" / "before_after.html").exists()
    theirs = diffusers.WanPipeline.from_pretrained(tmp_path / "wan")
    ours = diffusers.WanPipeline.from_pretrained(tmp_path / "run" / "model")
    theirs.load_lora_weights(tmp_path / "run" / "adapter")
    base, merged = (dict(p.transformer.named_parameters()) for p in (theirs, ours))
    name = "blocks.0.attn1.to_q"
    delta = base[f"{name}.lora_B.default_0.weight"] @ base[f"{name}.lora_A.default_0.weight"]
    assert delta.abs().max() > 0
    torch.testing.assert_close(base[f"{name}.base_layer.weight"] + delta, merged[f"{name}.weight"], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- schedulers and refusals

def test_wan_with_its_own_scheduler():
    """The released folders hold a UniPC scheduler with flow sigmas: it is a flow, sampled by it without us, by Euler steps with us."""
    pipe, args = make("Wan 2.1")
    pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert data.prediction_type(pipe) == "flow"
    data.drive(pipe, CPU)
    call = {**args, "prompt": PROMPTS, "num_inference_steps": STEPS, "output_type": "pt"}
    rollout = grpo.sample(pipe, RECORDS, SEEDS, options(), call)
    assert rollout.sigmas[-1] == 0 and (rollout.sigmas.diff() < 0).all() and rollout.sigmas[0] <= 1
    assert policy_gradient(pipe, rollout, ADVANTAGES, options()) == 0 and data.prediction_type(pipe) == "flow"


def test_a_schedule_that_is_no_flow_is_refused():
    pipe, args = make("Wan 2.1")
    data.drive(pipe, CPU)
    stock = pipe.scheduler.scheduler
    set_timesteps = stock.set_timesteps

    def inverted(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        stock.sigmas = 80 * stock.sigmas

    stock.set_timesteps = inverted
    with pytest.raises(ValueError, match=r"noise levels .*they must fall within \[0, 1\]"):
        grpo.sample(pipe, RECORDS, SEEDS, options(), {**args, "num_inference_steps": STEPS})


def test_what_the_driver_cannot_carry_is_refused_with_the_reason():
    for kind, reason in ((diffusers.LTX2Pipeline, "copies the scheduler"), (diffusers.DDPMPipeline, "has no prepare_latents")):
        with pytest.raises(ValueError, match=f"{kind.__name__} .*{reason}"):
            data.drive(object.__new__(kind), CPU)


def test_an_epsilon_model_is_refused():
    pipe, args = make("SD1.5")
    with pytest.raises(ValueError, match="predicts epsilon: it is no flow"):
        grpo.check_run(options(), data.drive(pipe, CPU), [{"prompt": "a cat"}], args, {"flex"})
