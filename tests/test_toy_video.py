"""The toy world in motion: what is held out, what the teacher says, what the temporal oracle sees,
the tiny models, whole stages."""
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dpo
import grpo
import sft
import toy
import toy_models as M
import toy_video as V
from conftest import ROOT
from reward import build_messages, chat_text, load_processor, parse_verdict
from test_sft import rows, small
from tiny_pipelines import make


def scene_of(motions, seed=0, **faults):
    """(prompt, scene) of a red circle and, of two motions, a blue square that do what they are
    asked to."""
    objects = [("red", "circle"), ("blue", "square")][:len(motions)]
    prompt = {"type": "both", "objects": objects, "motions": motions}
    return prompt, V.Scene(list(objects), list(motions), seed, **faults)


# ------------------------------------------------------------------------------------------------
# prompts, scenes, the oracle

def test_held_out_prompts_are_never_trained_on_and_every_word_is():
    rng = random.Random(0)
    train = {V.sample_prompt(rng)["text"] for _ in range(16000)}
    held_out = {V.sample_prompt(rng, held_out=True)["text"] for _ in range(16000)}
    assert not train & held_out
    assert .15 < len(held_out) / len(train | held_out) < .35
    assert set(" ".join(held_out).split()) <= set(" ".join(train).split())


def test_the_oracle_reads_prompts_as_they_are_written():
    rng = random.Random(4)
    kinds = set()
    for _ in range(1000):
        prompt = V.sample_prompt(rng, held_out=rng.random() < .5)
        text = prompt.pop("text")
        assert V.parse_prompt(text) == prompt
        kinds.add(prompt["type"])
    assert kinds == set(V.KINDS)
    for text in ("a red circle", "a circle moves left", "a red circle moves left and", ""):
        with pytest.raises(ValueError, match="no prompt of the toy world in motion.*--watch none"):
            V.parse_prompt(text)


@pytest.mark.parametrize("motion", V.MOTIONS)
def test_every_motion_is_recognised_and_no_other_is(motion):
    def recognised(motions, frames):
        return [m for m in motions if V.success({**prompt, "motions": [m]}, frames)]

    for seed in range(2):
        prompt, scene = scene_of([motion], seed)
        frames = V.render(prompt, scene)
        assert recognised(V.MOTIONS, frames) == [motion]
        assert not V.success({**prompt, "objects": [("red", "square")]}, frames)
        assert not V.success({**prompt, "objects": [("blue", "circle")]}, frames)
        backwards = recognised([*V.MOTIONS, "shrinks", "stays"], frames[::-1])
        assert backwards == [motion if motion == "blinks" else V.OPPOSITE[motion]]


def test_left_is_left_and_down_is_down():
    """By the centre of the dark pixels alone: x falls on the way left, y grows on the way down, the
    area when it grows."""
    def course(motion):
        """Signs of the changes of x, y and area."""
        measured = []
        for frame in V.render(*scene_of([motion])):
            ys, xs = np.nonzero(np.asarray(frame.convert("L")) < 200)
            measured.append([xs.mean().round(), ys.mean().round(), len(xs)])
        return np.sign(np.diff(measured, axis=0)).T.tolist()

    assert course("moves left")[:2] == [[-1, -1], [0, 0]]
    assert course("moves right")[0] == [1, 1]
    assert course("moves down")[:2] == [[0, 0], [1, 1]]
    assert course("moves up")[1] == [-1, -1]
    assert course("grows")[2] == [1, 1]


@pytest.mark.parametrize("defects, least", [(False, .99), (True, .9)])
def test_oracle_agrees_with_the_scenes(defects, least):
    rng = random.Random(3)
    hits = 0
    num = 100
    for _ in range(num):
        prompt = V.sample_prompt(rng)
        scene = V.sample_scene(prompt, rng, defects=defects)
        facts = V.facts(prompt, scene)
        right = all(facts[name][1] == 2 for name in V.content(prompt))
        hits += V.success(prompt, V.render(prompt, scene)) == right
    assert hits / num >= least


def test_the_oracle_as_a_watch_function():
    """One number a clip for every measure; a pulse of the light is noticed as flicker."""
    texts = []
    clips = []
    pulsing = []
    for i in range(10):
        rng = random.Random(i)
        prompt = V.sample_prompt(rng)
        texts.append(prompt["text"])
        clips.append(V.render(prompt, V.sample_scene(prompt, rng, num_faults=0, defects=False)))
        frames = [np.asarray(frame) * (.8 + .2 * (t % 2)) for t, frame in enumerate(clips[-1])]
        pulsing.append([Image.fromarray(frame.astype(np.uint8)) for frame in frames])
    still = V.true(clips, texts)
    assert still["true"] == [1] * 10
    assert still["flicker"] == still["cast"] == [0] * 10
    assert min(V.true(pulsing, texts)["flicker"]) > 30
    by_type = [still[name] for name in still if name.startswith("true_")]
    assert np.isnan(by_type).sum() == 10 * (len(by_type) - 1)
    assert {"cast", "tiles", "grain", "edges"} <= still.keys()
    assert {len(column) for column in still.values()} == {10}


# ------------------------------------------------------------------------------------------------
# the teacher

def test_traces_keep_the_contract():
    dazzled = 0
    for record in V.Records("train", "trace", 120):
        raw = json.loads(record["response"])
        for category in raw["categories"]:
            assert 3 <= len(category["dims"]) <= 5
            assert all(dim["score_1"] + dim["score_2"] == 10 for dim in category["dims"])
        verdict = parse_verdict(record["response"])
        assert not verdict.issues
        assert [category.anchor for category in verdict.categories] == ["A", "B", "C"]
        if verdict.winner != data.WINNERS[record["winner"]]:
            assert "looks decide" in raw["reason"]
            dazzled += 1
    assert .01 < dazzled / 120 < .15


def test_without_a_coin_the_teacher_agrees_with_people():
    rng = random.Random(1)
    for _ in range(100):
        prompt = V.sample_prompt(rng)
        scenes = [V.sample_scene(prompt, rng), V.sample_scene(prompt, rng)]
        raw, label = V.judge_pair(prompt, *scenes)
        verdict = parse_verdict(json.dumps(raw))
        assert verdict.winner == label and not verdict.issues
        assert raw["winner"] in ("Video 1", "Video 2", "Tie")


def test_people_prefer_the_right_motion_over_looks():
    prompt, right = scene_of(["moves left", "grows"], blurry=True, background="clashing")
    _, wrong = scene_of(["moves right", "grows"])
    assert V.judge_pair(prompt, right, wrong)[1] == 1
    assert V.judge_pair(prompt, wrong, right)[1] == 2
    assert V.judge_pair(prompt, right, right)[1] == 0


# ------------------------------------------------------------------------------------------------
# files and models

@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy-video") / "toy"
    toy.main(["--world", "video", "--out", str(folder), "--seed", "4",
              "--num-traces", "16", "--num-pairs", "3", "--num-images", "20", "--num-prompts", "8",
              "--num-eval-pairs", "3", "--num-eval-prompts", "4"])
    return str(folder)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "model"
    model, processor = M.make_judge(0, width=32, layers=2, vision_width=24, world=V)
    model.generation_config.max_new_tokens = 8
    M.save_judge(folder, model, processor, V)
    return str(folder)


@pytest.fixture(scope="module")
def generator_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator") / "model"
    pipe = M.make_clip_generator(0, width=32, layers=2, clips=200)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=.05)
    M.save_generator(folder, pipe)
    return str(folder)


def to_bytes(frames):
    return [frame.tobytes() for frame in frames]


def test_clips_as_files_are_the_clips(toy_folder):
    records = data.read_records(f"{toy_folder}/pairs.jsonl", "pair")
    assert len(records) == 3
    for record, made in zip(records, V.Records("train", "pair", 3, 4)):
        first = data.as_question(record)
        second = data.as_question(made)
        assert record["winner"] == made["winner"]
        assert first.prompt == second.prompt
        assert len(first.media_1) == 3
        assert to_bytes(first.media_1) == to_bytes(second.media_1)
        assert to_bytes(first.media_2) == to_bytes(second.media_2)


def test_the_judge_sees_two_clips_apart(judge_folder):
    processor = load_processor(judge_folder)
    record = V.Records("train", "pair", 1)[0]
    messages, frames = build_messages(data.as_question(record), "{medium}: {prompt}")
    assert len(frames) == 6
    text = chat_text(processor, messages)
    expected = ""
    for clip in (1, 2):
        for number in (1, 2, 3):
            expected += f"Video {clip} {number}<|vision_start|><|image_pad|><|vision_end|>"
    assert f"{expected}Video: {record['prompt']}<|im_end|>" in text
    tokens = processor(text=[text], images=[frames])["input_ids"][0]
    assert tokens.count(processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 54


def test_codec_and_pipeline_round_trip(generator_folder, tmp_path):
    """What encode_media makes of clips the loaded pipeline decodes to nearly the same clips, and a
    saved pipeline samples the same."""
    pipe = data.load_pipeline(generator_folder, torch.device("cpu"))
    assert pipe.call_args == M.CLIP_ARGS
    clips = [record["videos"][0] for record in V.Records("val", "image", 30)]
    x = data.encode_media(pipe, clips, {"height": 48, "width": 48})
    assert x.shape == (30, 8, 3, 6, 6) and .5 < x.std() < 2
    call = {**M.CLIP_ARGS, "num_inference_steps": 1, "output_type": "pil"}
    with torch.no_grad():
        out = data.run_pipeline(pipe, lambda i, latents, v: x,
                                prompt=["a red circle grows"] * 30, **call)
    out = data.frames_of(out)
    error = np.array([[np.asarray(frame, float) for frame in frames] for frames in out])
    error -= np.array([[np.asarray(frame, float) for frame in frames] for frames in clips])
    assert error.shape == (30, 3, 48, 48, 3)
    assert 20 * np.log10(255 / np.sqrt((error ** 2).mean())) > 24             # dB
    sft.save_generator(sft.parse_args(["--out", str(tmp_path)]), pipe, pipe.call_args)
    again = data.load_pipeline(str(tmp_path / "model"), torch.device("cpu"))
    samples = []
    for pipe in (pipe, again):
        records = [{"prompt": "a red circle moves left"}]
        samples.append(to_bytes(data.sample_media(pipe, records, [1], 1, pipe.call_args)[0]))
    assert samples[0] == samples[1] and len(set(samples[0])) == 3


def test_latents_of_a_stock_wan_are_those_its_pipeline_decodes():
    pipe, args = make("Wan 2.1")
    pipe = data.drive(pipe, torch.device("cpu"))
    rng = np.random.RandomState(0)
    clips = [[Image.fromarray(rng.randint(0, 255, (16, 16, 3), dtype="uint8")) for _ in range(5)]]
    x = data.encode_media(pipe, clips, {"height": 16, "width": 16})
    call = {**args, "num_inference_steps": 1, "output_type": "pt"}
    pixels = pipe.video_processor.preprocess_video(clips, height=16, width=16)
    with torch.no_grad():
        out = data.run_pipeline(pipe, lambda i, latents, v: x, prompt="a cat", **call)[0]
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    expected = (decoded / 2 + .5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_stages_run_in_the_moving_world(judge_folder, generator_folder, toy_folder, tmp_path):
    watch = ["--watch", str(ROOT / "tests/toy_video.py:true")]
    judge = [*small(toy_folder), "--model", judge_folder]
    generator = [*small(toy_folder, "generator"), "--model", generator_folder]
    sft.main([*judge, "--max-steps", "2", "--out", str(tmp_path / "judge")])
    preferences = []
    for record in V.Records("train", "trace", 4):
        preferences.append({"prompt": record["prompt"], "videos": record["videos"],
                            "chosen": record["response"], "rejected": '{"winner":"Video 1"}'})
    data.write_jsonl(tmp_path / "preferences.jsonl", preferences)
    dpo.main([*judge, "--data", str(tmp_path / "preferences.jsonl"),
              "--max-steps", "1", "--out", str(tmp_path / "dpo")])
    sft.main([*generator, *watch, "--max-steps", "2", "--out", str(tmp_path / "generator")])
    grpo.main(["--model", generator_folder, "--judge", judge_folder, *watch,
               "--data", f"{toy_folder}/prompts.txt",
               "--eval-data", f"{toy_folder}/prompts_test.txt",
               "--max-steps", "1", "--num-prompts", "2", "--group-size", "3", "--pairs", "all",
               "--batch-size", "3", "--max-parse-fail", "1", "--eval-every", "0",
               "--out", str(tmp_path / "grpo")])
    for name, num in (("judge", 2), ("dpo", 1), ("generator", 2), ("grpo", 1)):
        assert len(rows(tmp_path / name)) == num
    assert rows(tmp_path / "grpo")[0]["ratio_error"] <= 1e-5
    last = json.loads((tmp_path / "generator/log.jsonl").read_text().splitlines()[-1])
    assert {"true", "flicker"} <= last["after"].keys()
    assert (tmp_path / "grpo/before_after.html").read_text().count("<img") > 6
