"""The toy world in motion: what is held out, what the teacher says, what the temporal oracle sees, the tiny models, whole stages."""
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
import toy_models as M
import toy_video as V
from reward import build_messages, chat_text, parse_verdict
from test_sft import GRPO, SMALL, rows
from tiny_pipelines import make


def scene_of(motions, seed=0, **faults):
    """(prompt, scene) of a red circle and, of two motions, a blue square that do what they are asked to."""
    objects = [("red", "circle"), ("blue", "square")][:len(motions)]
    return dict(type="both", objects=objects, motions=motions), V.Scene(list(objects), list(motions), seed, **faults)


def test_held_out_prompts_are_never_trained_on_and_every_word_is():
    rng = random.Random(0)
    train, held = ({V.sample_prompt(rng, h)["text"] for _ in range(16000)} for h in (False, True))
    assert not train & held and .15 < len(held) / len(train | held) < .35
    assert {w for t in held for w in t.split()} <= {w for t in train for w in t.split()}


@pytest.mark.parametrize("verb", V.MOTIONS)
def test_every_motion_is_recognised_and_no_other_is(verb):
    for seed in range(2):
        prompt, scene = scene_of([verb], seed)
        frames = V.render(prompt, scene)
        assert [m for m in V.MOTIONS if V.success({**prompt, "motions": [m]}, frames)] == [verb]
        assert not V.success({**prompt, "objects": [("red", "square")]}, frames) and not V.success({**prompt, "objects": [("blue", "circle")]}, frames)
        backwards = [m for m in [*V.MOTIONS, "shrinks", "stays"] if V.success({**prompt, "motions": [m]}, frames[::-1])]
        assert backwards == [verb if verb == "blinks" else V.OPPOSITE[verb]]


def test_left_is_left_and_down_is_down():
    """By the centre of the dark pixels alone: x falls on the way left, y grows on the way down, the area when it grows."""
    def course(verb):
        dark = [np.nonzero(np.asarray(f.convert("L")) < 200) for f in V.render(*scene_of([verb]))]
        return [np.sign(np.diff(values)).tolist() for values in zip(*((xs.mean().round(), ys.mean().round(), len(xs)) for ys, xs in dark))]
    assert course("moves left")[:2] == [[-1, -1], [0, 0]] and course("moves right")[0] == [1, 1]
    assert course("moves down")[:2] == [[0, 0], [1, 1]] and course("moves up")[1] == [-1, -1] and course("grows")[2] == [1, 1]


@pytest.mark.parametrize("defects, least", [(False, .99), (True, .9)])
def test_oracle_agrees_with_the_scenes(defects, least):
    rng, hits, n = random.Random(3), 0, 100
    for _ in range(n):
        prompt = V.sample_prompt(rng)
        scene = V.sample_scene(prompt, rng, defects=defects)
        hits += V.success(prompt, V.render(prompt, scene)) == all(V.facts(prompt, scene)[name][1] == 2 for name in V.content(prompt))
    assert hits / n >= least


def test_drift_between_frames_is_noticed():
    records = [dict(toy_prompt=V.sample_prompt(random.Random(i)), type="move") for i in range(10)]
    clips = [V.render(r["toy_prompt"], V.sample_scene(r["toy_prompt"], random.Random(i), 0, defects=False)) for i, r in enumerate(records)]
    still = V.truth(records, clips)
    assert still["true"] == 1 and still["flicker"] == still["cast"] == 0
    pulse = [[Image.fromarray((np.asarray(f) * (.8 + .2 * (t % 2))).astype(np.uint8)) for t, f in enumerate(frames)] for frames in clips]
    assert V.truth(records, pulse)["flicker"] > 30


def test_traces_keep_the_contract():
    dazzled = 0
    for record in V.Records("train", "trace", 120):
        verdict = parse_verdict(record["response"])
        assert not [i for i in verdict.issues if "sum" in i] and [c.anchor for c in verdict.categories] == ["A", "B", "C"]
        assert all(3 <= len(c.dims) <= 5 and all(d.score_1 + d.score_2 == 10 for d in c.dims) for c in verdict.categories)
        if verdict.winner != data.WINNERS[record["winner"]]:
            assert "looks decide" in json.loads(record["response"])["reason"]
            dazzled += 1
    assert .01 < dazzled / 120 < .15


def test_without_a_coin_the_teacher_agrees_with_people():
    rng = random.Random(1)
    for _ in range(100):
        prompt = V.sample_prompt(rng)
        verdict, label = V.judge_pair(prompt, V.sample_scene(prompt, rng), V.sample_scene(prompt, rng))
        read = parse_verdict(json.dumps(verdict))
        assert read.winner == label and not read.issues and verdict["winner"] in ("Video 1", "Video 2", "Tie")


def test_people_prefer_the_right_motion_over_looks():
    prompt, right = scene_of(["moves left", "grows"], blurry=True, background="clashing")
    _, wrong = scene_of(["moves right", "grows"])
    assert V.judge_pair(prompt, right, wrong)[1] == 1 and V.judge_pair(prompt, wrong, right)[1] == 2 and V.judge_pair(prompt, right, right)[1] == 0


def test_clips_as_files_are_the_clips(tmp_path):
    made = data.open_records("toy-video:test", "pair", 3, 4)
    data.write_jsonl(tmp_path / "toy.jsonl", made)
    found = data.read_records(tmp_path / "toy.jsonl", "pair")
    for a, b in zip(found, made):
        first, second = data.comparison(a), data.comparison(b)
        assert first.prompt == second.prompt and a["winner"] == b["winner"]
        assert [f.tobytes() for f in first.media_1 + first.media_2] == [f.tobytes() for f in second.media_1 + second.media_2] and len(first.media_1) == 3


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "model"
    model, processor = M.make_judge(0, width=32, layers=2, vision_width=24, vision_layers=2, world=V)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "template.txt").write_text(M.INSTRUCTION.replace("image", "video"))
    return str(folder)


@pytest.fixture(scope="module")
def generator_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator") / "model"
    pipe = M.make_clip_generator(0, width=32, layers=2, clips=200)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=.05)
    pipe.save_pretrained(folder)
    return str(folder)


def test_the_judge_sees_two_clips_apart(judge_folder):
    from reward import load_processor
    processor, record = load_processor(judge_folder), V.Records("train", "pair", 1)[0]
    messages, frames = build_messages(data.comparison(record), "{medium}: {prompt}")
    text, frame = chat_text(processor, messages), "<|vision_start|><|image_pad|><|vision_end|>"
    shown = "".join(f"Video {clip} {number}{frame}" for clip in (1, 2) for number in (1, 2, 3))
    assert len(frames) == 6 and f"{shown}Video: {record['prompt']}<|im_end|>" in text
    tokens = processor(text=[text], images=[frames])["input_ids"][0]
    assert tokens.count(processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 54


def test_codec_and_pipeline_round_trip(generator_folder, tmp_path):
    """What encode_media makes of clips the loaded pipeline decodes to nearly the same clips, and a saved pipeline samples the same."""
    pipe, clips = sft.load_pipeline(generator_folder, torch.device("cpu")), [r["videos"][0] for r in V.Records("val", "image", 30)]
    x = sft.encode_media(pipe, clips, height=48, width=48)
    assert x.shape == (30, 8, 3, 6, 6) and .5 < x.std() < 2
    out = sft.frames_of(sft.run(pipe, lambda i, latents, v: x, prompt=["a red circle grows"] * 30, output_type="pil", **{**M.CLIP_ARGS, "num_inference_steps": 1}))
    error = np.array([[np.asarray(f, float) for f in frames] for frames in out]) - np.array([[np.asarray(f, float) for f in frames] for frames in clips])
    assert error.shape == (30, 3, 48, 48, 3) and 20 * np.log10(255 / np.sqrt((error ** 2).mean())) > 24             # dB
    sft.save_pipeline(pipe, tmp_path / "again")
    ask = dict(prompts=["a red circle moves left"], seeds=[1], **M.CLIP_ARGS)
    one, two = (sft.sample_media(p, **ask)[0] for p in (pipe, sft.load_pipeline(tmp_path / "again", torch.device("cpu"))))
    assert [f.tobytes() for f in one] == [f.tobytes() for f in two] and len({f.tobytes() for f in one}) == 3


def test_latents_of_a_stock_wan_are_those_its_pipeline_decodes():
    pipe, args = make("Wan 2.1")
    pipe = sft.prepare(pipe, torch.device("cpu"))
    clips = [[Image.fromarray(np.random.RandomState(i).randint(0, 255, (16, 16, 3), dtype="uint8")) for i in range(5)]]
    x = sft.encode_media(pipe, clips, height=16, width=16)
    seen = sft.run(pipe, lambda i, latents, v: x, prompt="a cat", output_type="pt", **{**args, "num_inference_steps": 1})[0]
    coded = pipe.vae.decode(pipe.vae.encode(pipe.video_processor.preprocess_video(clips, height=16, width=16)).latent_dist.mode()).sample
    torch.testing.assert_close(seen, (coded / 2 + .5).clamp(0, 1).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_stages_run_in_the_moving_world(judge_folder, generator_folder, tmp_path, monkeypatch):
    world = ["--world", "video"]
    sft.main([*world, "--model", judge_folder, "--max-steps", "2", "--out", str(tmp_path / "judge"), *SMALL])
    dpo_args = dpo.parse_args(world)
    assert (dpo_args.model, dpo_args.out, dpo_args.data) == ("out/video-judge-sft/model", "out/video-judge-dpo", "toy-video")
    assert (dpo_args.max_new_tokens, dpo_args.judge_batch) == (256, 200)       # toy verdicts are short, clips' too
    for main, command in ((dpo.main, "python sft.py --world video"), (grpo.main, "python sft.py --task generator --world video")):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match=f"{command}$"):
            main(world)
    data.write_jsonl(tmp_path / "preferences.jsonl", [{**r, "chosen": r.pop("response"), "rejected": '{"winner":"Video 1"}'} for r in V.Records("train", "trace", 4)])
    dpo.main([*world, "--model", judge_folder, "--data", str(tmp_path / "preferences.jsonl"), "--max-steps", "1", "--out", str(tmp_path / "dpo"), *SMALL])
    sft.main([*world, "--task", "generator", "--model", generator_folder, "--data-num", "20", "--max-steps", "2", "--out", str(tmp_path / "generator"), *SMALL,
              "--pipe-arg", *(f"{k}={v}" for k, v in M.CLIP_ARGS.items())])
    grpo.main([*world, "--model", generator_folder, "--judge", judge_folder, "--out", str(tmp_path / "grpo"), *GRPO])
    assert [len(rows(tmp_path / out)) for out in ("judge", "dpo", "generator", "grpo")] == [2, 1, 2, 1] and rows(tmp_path / "grpo")[0]["max_ratio_error"] == 0
    for picture in ("generator/samples", "grpo/before_after"):
        moving, still = (Image.open(tmp_path / f"{picture}.{kind}") for kind in ("gif", "png"))
        assert moving.n_frames == 3 and still.width > 3 * moving.width - 40
    assert "true_both" in json.loads((tmp_path / "generator" / "log.jsonl").read_text().splitlines()[-1]) and Image.open(tmp_path / "judge" / "verdict.png").width > 600
