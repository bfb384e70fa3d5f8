"""The toy world: what is held out, what the teacher says, what the oracle sees, what it notices as
drift, and the files that toy.py writes."""
import json
import math
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import toy
import toy_oracle
import toy_world as W
from conftest import ROOT
from reward import parse_score, parse_verdict
from toy_oracle import parse_prompt, picture_stats, success

TINY = ["--num-traces", "6", "--num-pairs", "3", "--num-images", "2", "--num-prompts", "5",
        "--num-eval-pairs", "2", "--num-eval-prompts", "3"]


# ------------------------------------------------------------------------------------------------
# prompts and records

def test_held_out_prompts_are_never_trained_on_and_every_word_is():
    rng = random.Random(0)
    train = {W.sample_prompt(rng)["text"] for _ in range(6000)}
    held_out = {W.sample_prompt(rng, held_out=True)["text"] for _ in range(6000)}
    assert not train & held_out
    assert .15 < len(held_out) / len(train | held_out) < .35
    assert set(" ".join(held_out).split()) <= set(" ".join(train).split())


def test_records_are_functions_of_their_place():
    one = W.Records("train", "trace", 5, seed=1)[3]
    again = W.Records("train", "trace", 9, seed=1)[3]
    other = W.Records("val", "trace", 5, seed=1)[3]
    assert one == again and one["images"][0].tobytes() == again["images"][0].tobytes()
    assert one["response"] != other["response"]


# ------------------------------------------------------------------------------------------------
# the teacher

def test_traces_keep_the_contract():
    dazzled = 0
    for record in W.Records("train", "trace", 200):
        raw = json.loads(record["response"])
        assert [set(dim) for dim in raw["categories"][0]["dims"]][0] == {
            "name", "reason_1", "reason_2", "score_1", "score_2"}
        for category in raw["categories"]:
            assert 3 <= len(category["dims"]) <= 5
            assert all(dim["score_1"] + dim["score_2"] == 10 for dim in category["dims"])
        verdict = parse_verdict(record["response"])
        assert not verdict.issues
        assert {"A", "B", "C"} <= {category.anchor for category in verdict.categories}
        has_relation = "D. Spatial Relation" in [category.name for category in verdict.categories]
        assert has_relation == (record["type"] == "spatial")
        if verdict.winner != {"Image 1": 1, "Image 2": 2, "Tie": 0}[record["winner"]]:
            signs = [category["cat_winner"] for category in raw["categories"]]
            assert signs[1] == signs[2] == raw["winner"]      # the teacher's one fault
            assert signs[0] == record["winner"]
            assert "looks decide" in raw["reason"]
            dazzled += 1
    assert .02 < dazzled / 200 < .15


def test_people_prefer_content_over_looks():
    prompt = {"type": "single", "objects": [("red", "circle")], "count": 1, "relation": None}
    right = W.Scene([("red", "circle")], "left", 0, blurry=True, small=True)
    wrong = W.Scene([("blue", "star")], "left", 0)
    assert W.judge_pair(prompt, right, wrong)[1] == 1
    assert W.judge_pair(prompt, wrong, right)[1] == 2
    assert W.judge_pair(prompt, right, right)[1] == 0


def test_scores_and_answers_by_hand():
    """Of a green circle where a red one above a blue square was wanted: the shape is right and so
    is the square, the relation holds."""
    prompt = {"type": "spatial", "objects": [("red", "circle"), ("blue", "square")], "count": 1,
              "relation": "above"}
    scene = W.Scene([("green", "circle"), ("blue", "square")], "above", 0, blurry=True)
    # levels A: 1, 2, 2 of 2; B: 0, 2, 2; C: 2, 2, 2; D: 2, 2, 2, so 4.33, 3.67, 5, 5, and
    # (5 * 4.33 + 3 * 3.67 + 1.5 * 5 + 4 * 5) / 13.5 = 4.457
    text = W.score_image(prompt, scene)
    assert text == ("Alignment Score (1-5): 4\nCoherence Score (1-5): 4\n"
                    "Style Score (1-5): 5\nFinal Score: 4.5")
    assert parse_score(text) == 4.5
    answers = {W.ask_about(scene, random.Random(i)) for i in range(300)}
    assert {("How many circles are there?", "one"), ("How many stars are there?", "none"),
            ("What color is the square?", "blue"), ("Is there a green circle?", "yes"),
            ("Is there a red circle?", "no")} <= answers
    assert len(dict(answers)) == len(answers)                 # a question has one answer
    with pytest.raises(ValueError, match="no preference records; expected one of trace, pair"):
        W.Records("train", "preference", 1)


# ------------------------------------------------------------------------------------------------
# the oracle

def test_the_oracle_reads_prompts_as_they_are_written():
    rng = random.Random(4)
    kinds = set()
    for _ in range(2000):
        prompt = W.sample_prompt(rng, held_out=rng.random() < .5)
        text = prompt.pop("text")
        assert parse_prompt(text) == prompt
        kinds.add(prompt["type"])
    assert kinds == set(W.KINDS)


@pytest.mark.parametrize("text", ["a cat", "", "a red circle below", "five red circles",
                                  "two red circle", "a red circle and a star", "A red circle"])
def test_texts_that_are_no_toy_prompts_are_refused(text):
    with pytest.raises(ValueError, match="no prompt of the toy world.*or --watch none"):
        parse_prompt(text)


def test_oracle_agrees_with_the_scenes():
    rng = random.Random(3)
    hits = 0
    num = 300
    for _ in range(num):
        prompt = W.sample_prompt(rng)
        scene = W.sample_scene(prompt, rng, defects=rng.random() < .5)
        facts = W.facts(prompt, scene)
        names = W.content(prompt)
        if prompt["type"] == "spatial":
            names.append("Relation accuracy")
        right = all(facts[name][1] == 2 for name in names)
        hits += success(prompt, W.render(prompt, scene)) == right
    assert hits / num > .95


def faultless(prompt, rng):
    return W.sample_scene(prompt, rng, num_faults=0, defects=False)


def test_the_oracle_as_a_watch_function(tmp_path):
    """Loaded from its file as a stage loads it; one number an item for every measure, NaN for items
    of another type."""
    rng = random.Random(5)
    prompts = [W.sample_prompt(rng, kinds=[kind]) for kind in ("single", "spatial")]
    texts = [prompt["text"] for prompt in prompts]
    media = [[W.render(prompt, faultless(prompt, rng))] for prompt in prompts]
    true = runpy.run_path(str(ROOT / "tests/toy_oracle.py"))["true"]
    values = true(media, texts)
    assert set(values) == {"true", "true_single", "true_spatial", "cast", "tiles", "grain", "edges"}
    assert {len(column) for column in values.values()} == {2}
    assert values["true"] == [1, 1] and values["cast"] == [0, 0]
    assert values["true_single"][0] == 1 and math.isnan(values["true_single"][1])
    assert math.isnan(values["true_spatial"][0]) and values["true_spatial"][1] == 1
    assert true(media[::-1], texts)["true"] == [0, 0]
    with pytest.raises(ValueError, match="'a cat' is no prompt of the toy world"):
        true(media, ["a cat", "a dog"])


def test_both_oracles_load_without_the_folder_of_tests(tmp_path):
    """As in a stage: tests/ is not on sys.path."""
    code = ("import runpy, sys\n"
            "for path in sys.argv[1:]:\n"
            "    print(callable(runpy.run_path(path)['true']), end=' ')")
    paths = [str(ROOT / f"tests/{name}.py") for name in ("toy_oracle", "toy_video")]
    done = subprocess.run([sys.executable, "-c", code, *paths], cwd=tmp_path, env={},
                          capture_output=True, text=True, check=True)
    assert done.stdout == "True True "


def mean_stats(images, name):
    return np.mean([picture_stats(image)[name] for image in images])


@pytest.mark.parametrize("change, measure", [
    ({"background": "tinted"}, "cast"), ({"background": "tiled"}, "tiles"),
    ({"noisy": True}, "grain"), ({"blurry": True}, "edges")])
def test_picture_stats_notice_drift(change, measure):
    rng = random.Random(1)
    plain = []
    drifted = []
    for _ in range(30):
        prompt = W.sample_prompt(rng)
        scene = faultless(prompt, rng)
        plain.append(W.render(prompt, scene))
        for name, value in change.items():
            setattr(scene, name, value)
        drifted.append(W.render(prompt, scene))
    before = mean_stats(plain, measure)
    after = mean_stats(drifted, measure)
    assert after < .7 * before if measure == "edges" else after > before + 2


def test_a_faint_green_patchwork_is_noticed():
    """The drift an earlier sketch fell to: cells of the ground alternate by 8 grey levels in the
    red and blue channels."""
    rng = random.Random(2)
    board = np.indices((3, 3)).sum(0) % 2
    cast = np.kron(board, np.ones((16, 16)))[..., None] * np.array([8, 0, 8])
    images = []
    tiled = []
    for _ in range(20):
        prompt = W.sample_prompt(rng)
        images.append(W.render(prompt, faultless(prompt, rng)))
        pixels = np.asarray(images[-1], float) - cast
        tiled.append(np.clip(pixels, 0, 255).astype(np.uint8))
    assert mean_stats(tiled, "tiles") > mean_stats(images, "tiles") + 2


# ------------------------------------------------------------------------------------------------
# toy.py

def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_files_hold_the_records(toy_folder):
    files = [("traces", "train", "trace", 48, 0), ("pairs", "train", "pair", 16, 0),
             ("images", "train", "image", 24, 0), ("pairs_test", "test", "pair", 4, 1)]
    for name, split, kind, num, seed in files:
        rows = read(f"{toy_folder}/{name}.jsonl")
        assert len(rows) == num
        for row, record in zip(rows, W.Records(split, kind, num, seed)):
            assert row.keys() == record.keys()
            for path, image in zip(row.pop("images"), record.pop("images")):
                assert Image.open(f"{toy_folder}/{path}").tobytes() == image.tobytes()
            assert row == record
    held_out = W.Records("test", "prompt", 4, 7)
    texts = Path(toy_folder, "prompts_test.txt").read_text().splitlines()
    assert texts == [record["prompt"] for record in held_out]
    assert len(Path(toy_folder, "prompts.txt").read_text().splitlines()) == 24


def test_the_same_options_write_the_same_files(toy_folder, tmp_path, monkeypatch, capsys):
    """Byte for byte, models too; another seed other ones, but the same held-out records. A folder
    that is there is kept, and one made otherwise is refused."""
    monkeypatch.chdir(tmp_path)
    toy.main([*TINY, "--out", "out/toy"])
    assert "\nNext: python sft.py\n" in capsys.readouterr().out
    files = [path for path in Path("out/toy").rglob("*") if path.is_file()]
    assert len(files) > 40
    for path in files:
        same = (Path(toy_folder) / path.relative_to("out/toy")).read_bytes()
        if path.suffix in (".jsonl", ".txt") and path.parent == Path("out/toy"):
            assert same.startswith(path.read_bytes())         # the fixture has more records
        elif path.name != "toy.json":
            assert same == path.read_bytes(), path

    monkeypatch.setattr(toy, "write_models", lambda *_: None)
    toy.main([*TINY, "--out", "other", "--seed", "4"])
    command = "Next: python sft.py --model other/judge --data other/traces.jsonl --eval-data"
    assert command in capsys.readouterr().out
    assert not list(Path().rglob("*.partial"))
    for name in ("traces.jsonl", "pairs.jsonl", "images.jsonl", "prompts.txt"):
        assert Path("other", name).read_bytes() != Path("out/toy", name).read_bytes()
    for name in ("pairs_test.jsonl", "prompts_test.txt", "images/pairs_test_000001_2.png"):
        assert Path("other", name).read_bytes() == Path("out/toy", name).read_bytes()

    monkeypatch.setattr(toy, "write_all", None)               # nothing more is written
    toy.main([*TINY, "--out", "other", "--seed", "4"])
    assert "other is already there, made with the same options" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other exists and was not made with these options"):
        toy.main([*TINY, "--out", "other"])
    Path("mine").mkdir()
    with pytest.raises(SystemExit, match="mine exists"):
        toy.main([*TINY, "--out", "mine"])


def test_a_failed_run_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no models")

    monkeypatch.setattr(toy, "write_models", fail)
    with pytest.raises(RuntimeError, match="no models"):
        toy.main([*TINY, "--out", str(tmp_path / "toy")])
    assert not (tmp_path / "toy").exists()


LOAD = """
import json, sys, torch, diffusers
for folder in sys.argv[1:]:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    call = json.load(open(f"{folder}/pipe_args.json"))
    images = pipe("a red circle", generator=torch.manual_seed(0), output_type="np", **call).images
    print(type(pipe).__name__, type(pipe.vae).__name__, images.shape, "%.4f" % images.mean())
"""


def test_the_pipeline_loads_without_this_repository(toy_folder, generator_folder, tmp_path):
    """By plain diffusers in another folder, also where the transformer has been replaced."""
    copy = tmp_path / "copy"
    shutil.copytree(f"{toy_folder}/generator", copy, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(f"{generator_folder}/transformer", copy / "transformer")
    folders = [f"{toy_folder}/generator", str(copy)]
    done = subprocess.run([sys.executable, "-c", LOAD, *folders], cwd=tmp_path,
                          env={"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    untrained, replaced = done.stdout.splitlines()
    assert untrained.startswith("FluxPipeline PatchCodec (1, 48, 48, 3)")
    assert replaced.startswith("FluxPipeline PatchCodec (1, 48, 48, 3)") and replaced != untrained


def test_the_judges_folder_is_complete(toy_folder):
    from reward import Comparison, LocalJudge
    judge = LocalJudge(f"{toy_folder}/judge", device="cpu")
    assert judge.model.generation_config.max_new_tokens == 256
    assert judge.templates[Comparison] == "Compare the images for: {prompt}"
    assert judge.processor.tokenizer.eos_token_id == judge.model.generation_config.eos_token_id


def test_a_verdict_is_few_tokens_and_any_text_comes_back():
    import toy_models
    tokenizer = toy_models.make_judge_tokenizer(num_texts=500)
    lengths = []
    for trace in W.Records("train", "trace", 20, seed=3):
        ids = tokenizer(trace["response"])["input_ids"]
        assert tokenizer.decode(ids) == trace["response"]
        lengths.append(len(ids))
    assert max(lengths) < 100
    for text in ('{"score_1":10,"score_2":0}', "naïve 図\n\t <b>", " a  red star, correct "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_toy_teacher_sees_what_it_is_shown(toy_folder):
    """In either order it writes what is in each image and, dazzled or not, the same winner."""
    from reward import Comparison, load_judge
    teacher = load_judge(f"{ROOT}/tests/toy_teacher.py:teacher")
    rows = read(f"{toy_folder}/pairs.jsonl")
    questions = []
    for row in rows:
        first, second = ([Image.open(f"{toy_folder}/{path}")] for path in row["images"])
        questions += [Comparison(row["prompt"], first, second),
                      Comparison(row["prompt"], second, first)]
    texts = teacher(questions)
    pairs = W.Records("train", "pair", len(rows))
    right = 0
    for i, row in enumerate(rows):
        forward = json.loads(texts[2 * i])
        backward = json.loads(texts[2 * i + 1])
        swapped = {"Image 1": "Image 2", "Image 2": "Image 1", "Tie": "Tie"}
        assert backward["winner"] == swapped[forward["winner"]]
        right += forward["winner"] == row["winner"]
        prompt, scenes, _, _ = pairs.scenes(i)
        for verdict, order in ((forward, scenes), (backward, scenes[::-1])):
            for dim in verdict["categories"][0]["dims"]:
                facts = [W.facts(prompt, scene)[dim["name"]][0] for scene in order]
                assert [dim["reason_1"], dim["reason_2"]] == facts
    assert len(rows) / 2 < right < len(rows)


def test_the_toy_teacher_refuses_other_pairs(monkeypatch):
    import toy_teacher
    from reward import Comparison
    monkeypatch.setattr(toy_teacher, "PAIRS", W.Records("train", "pair", 5))
    white = [Image.new("RGB", (48, 48), "white")]
    with pytest.raises(ValueError, match="a pair for 'a cat' is not in out/toy/pairs.jsonl as"):
        toy_teacher.teacher([Comparison("a cat", white, white)])
