"""The judge of an edit or of an animated image sees the source: questions, records, commands, GRPO."""
import json

import pytest
import torch
from PIL import Image

import data
import grpo
import reward
from reward import Candidate, Comparison, build_messages
from test_sft import rows
from tiny_pipelines import make

RED, GREEN, BLUE = (Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue"))
JUDGE = """
from reward import Comparison

def color(image):
    return image.resize((1, 1)).getpixel((0, 0))

def judge(questions):
    '''Whichever is closer to the source wins.'''
    texts = []
    for question in questions:
        [source] = question.source
        name = "red" if color(source) == (255, 0, 0) else "blue"
        assert question.prompt == f"animate the {name} one", (question.prompt, color(source))
        distances = [sum(abs(a - b) for a, b in zip(color(source), color(media[0])))
                     for media in (question.media_1, question.media_2)]
        winner = 1 if distances[0] <= distances[1] else 2
        texts.append(f"Image {winner} is better than Image {3 - winner}.")
    return texts
"""


@pytest.fixture
def folder(tmp_path):
    """A judge that wants to see the source, and pictures."""
    (tmp_path / "judge.py").write_text(JUDGE)
    for name, image in (("red", RED), ("green", GREEN), ("blue", BLUE)):
        image.save(tmp_path / f"{name}.png")
    return tmp_path


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def save_pipeline(family, path):
    """A tiny pipeline as a folder, its call's arguments but the image beside it."""
    pipe, args = make(family)
    args.pop("image")
    pipe.save_pretrained(path)
    (path / "pipe_args.json").write_text(json.dumps({**args, "num_inference_steps": 3}))


def test_the_source_is_shown_first_and_named():
    for question in (Comparison("make it red", [GREEN], [BLUE], [RED]),
                     Candidate("make it red", [GREEN], [RED])):
        [message], images = build_messages(question)
        *places, text = message["content"]
        assert images[0] is RED and images[1] is GREEN and len(places) == len(images)
        assert text["text"].startswith("The first image is the source") and "make it red" in text["text"]
    [message], images = build_messages(Comparison("a red circle", [GREEN], [BLUE]))
    assert images == [GREEN, BLUE] and "source" not in message["content"][-1]["text"]


def test_an_animated_image_is_judged_beside_clips():
    question = Comparison("let it move", [GREEN] * 3, [BLUE] * 3, [RED])
    [message], images = build_messages(question)
    assert images == [RED] + [GREEN] * 3 + [BLUE] * 3 and "Video 1" in message["content"][-1]["text"]


def test_pairs_of_edits_are_evaluated_with_their_sources(folder, capsys):
    pairs = [{"prompt": "animate the red one", "images": ["green.png", "red.png"],
              "winner": "Image 2", "source": "red.png"},
             {"prompt": "animate the blue one", "images": ["blue.png", "red.png"],
              "winner": "Image 1", "source": "blue.png"}]
    path = write(folder / "pairs.jsonl", pairs)
    data.main(["check", path])
    data.main(["eval", path, "--model", f"{folder}/judge.py:judge"])
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert float(lines["winner_accuracy"]) == float(lines["swap_consistency"]) == 1


def test_the_command_shows_the_source(folder, capsys):
    options = ["--prompt", "animate the red one", "--judge", f"{folder}/judge.py:judge"]
    items = [str(folder / "green.png"), str(folder / "red.png")]
    reward.main([*items, *options, "--source", str(folder / "red.png")])
    assert "overall: 2 wins" in capsys.readouterr().out


def test_grpo_shows_every_group_its_own_source(folder):
    """The judge dies where a question's source is not that of its prompt, also of held-out ones."""
    save_pipeline("Wan image-to-video", folder / "wan")
    prompts = write(folder / "edits.jsonl", [
        {"prompt": f"animate the {name} one", "source": f"{name}.png"} for name in ("red", "blue")])
    out = folder / "run"
    grpo.main(["--model", str(folder / "wan"), "--data", prompts, "--eval-data", prompts,
               "--watch", "none", "--judge", f"{folder}/judge.py:judge", "--sde-steps", "2",
               "--lora-rank", "2", "--group-size", "2", "--pairs", "all", "--num-prompts", "2",
               "--batch-size", "2", "--max-steps", "2", "--warmup-steps", "1", "--out", str(out)])
    steps = [row for row in rows(out) if "verdicts" in row]
    assert [row["verdicts"] for row in steps] == [2, 2]
    assert all(row["undecided"] == 0 for row in steps)


def test_scores_of_edits_are_refused(folder):
    """A pointwise reward is a function of media and prompts: it would not see the source."""
    pipe, args = make("Wan image-to-video")
    prompts = write(folder / "edits.jsonl", [
        {"prompt": f"animate the {name} one", "source": f"{name}.png"} for name in ("red", "blue")])
    options = ["--reward", "flex:.5,score:.5", "--num-prompts", "2", "--group-size", "2"]
    with pytest.raises(ValueError, match="a score is asked without the source of an edit"):
        grpo.check_run(grpo.parse_args(options), data.drive(pipe, torch.device("cpu")),
                       data.read_records(prompts, "prompt"), args, {"flex", "score"})


def test_generators_with_sources_are_trained_by_grpo_alone(folder):
    import dpo
    save_pipeline("FLUX.1 Kontext", folder / "kontext")
    pairs = write(folder / "pairs.jsonl", [
        {"prompt": "a", "images": ["green.png", "blue.png"], "winner": "Image 1",
         "source": "red.png"}])
    with pytest.raises(ValueError, match="with a source image generators are trained by grpo.py"):
        dpo.main(["--task", "generator", "--model", str(folder / "kontext"), "--data", pairs,
                  "--eval-data", pairs, "--watch", "none", "--out", str(folder / "run")])
