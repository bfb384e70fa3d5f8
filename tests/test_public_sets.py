"""The snippet of tests/README.md turns rows of public preference sets, made up in their form, into
pairs whose winners are those that the voters meant."""
import csv
import json
import math
import re
import sys
import types

import pytest
from PIL import Image

import data
from conftest import ROOT

PAGE = (ROOT / "tests/README.md").read_text()
SNIPPET = re.search(r"```python\n(# public_sets\.py\n.*?)```", PAGE, re.S)[1]
USAGE = re.search(r"```python\n(import json, data, public_sets\n.*?)```", PAGE, re.S)[1]


@pytest.fixture(scope="module")
def public_sets():
    module = types.ModuleType("public_sets")
    exec(compile(SNIPPET, "public_sets.py", "exec"), vars(module))
    return module


@pytest.fixture
def convert(public_sets, tmp_path, capsys):
    """convert(set, rows): (the records as data.py reads them, the printed lines), after its check
    of the written file."""
    def convert(name, rows):
        path = tmp_path / "pairs.jsonl"
        data.write_jsonl(path, public_sets.records(name, rows, tmp_path))
        printed = capsys.readouterr().out.splitlines()
        data.main(["check", str(path)])
        assert "all well formed" in capsys.readouterr().out
        return data.read_records(path, "pair"), printed
    return convert


@pytest.fixture
def make(tmp_path):
    """make(name): a file of that name in the folder, an image or a clip of two frames."""
    def make(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (8, 8), "red")
        if path.suffix == ".mp4":
            write_clip(path, [image, image])
        else:
            image.save(path)
        return name
    return make


def write_clip(path, frames):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame.resize((16, 16)))))
        file.mux(stream.encode())


def winners(records):
    return [record["winner"] for record in records]


def names(record, folder):
    """The record's media as paths in the folder."""
    return [str(path.relative_to(folder)) for path in record[data.medium_of(record)]]


def test_hpdv3_prefers_path1_in_either_place(convert, make, tmp_path):
    """Were it always the first, a judge could learn that the first is better."""
    good, bad = make("images/good.jpg"), make("images/bad.jpg")
    row = {"prompt": "a cat", "path1": good, "path2": bad, "model1": "flux", "model2": "sd2",
           "confidence": 0.9, "choice_dist": [9, 1]}
    records, printed = convert("HPDv3", [row] * 20)
    assert set(winners(records)) == {"Image 1", "Image 2"}
    for record in records:
        place = data.WINNERS[record["winner"]] - 1
        assert names(record, tmp_path)[place] == good
        assert names(record, tmp_path)[1 - place] == bad
    assert printed == ["HPDv3: 20 written"]


def test_rapidata_prefers_the_higher_result(convert, make):
    """A share of 0 is a result, a missing one is none."""
    row = {"prompt": "a dog runs", "file_name1": make("a.mp4"), "file_name2": make("b.mp4"),
           "weighted_results1_Coherence": 0.9, "weighted_results2_Coherence": 0.1}
    shares = [(0.7, 0.3), (0.0, 1.0), (0.5, 0.5), (None, 0.5), (math.nan, 0.5)]
    rows = [{**row, "weighted_results1_Preference": one, "weighted_results2_Preference": two}
            for one, two in shares]
    records, printed = convert("Rapidata", [*rows, row])
    assert winners(records) == ["Video 1", "Video 2", "Tie"]
    assert printed == ["Rapidata: 3 written", "Rapidata: 3 left out, vote is None"]


VOTES = ["leftvote", "rightvote", "tievote", "bothbad_vote"]


def test_genai_bench_images_come_in_memory(convert):
    """A vote that is none of the four is counted and printed."""
    row = {"prompt": "a cat", "left_model": "x", "right_model": "y",
           "left_image": Image.new("RGB", (8, 8), "red"),
           "right_image": Image.new("RGB", (8, 8), "blue")}
    rows = [{**row, "vote_type": vote} for vote in [*VOTES, "upvote", None]]
    records, printed = convert("GenAI-image", rows)
    assert winners(records) == ["Image 1", "Image 2", "Tie", "Tie"]
    for record in records:
        first, second = [data.load_media(path)[0].getpixel((0, 0)) for path in record["images"]]
        assert first == (255, 0, 0) and second == (0, 0, 255)
    assert printed == ["GenAI-image: 4 written", "GenAI-image: 1 left out, vote_type is 'upvote'",
                       "GenAI-image: 1 left out, vote_type is None"]


def test_genai_bench_videos_are_urls(convert, make, tmp_path):
    """They are downloaded, the two of a row to files of their own though their names are alike."""
    left, right = [(tmp_path / make(f"{side}/7.mp4")).as_uri() for side in ("x", "y")]
    row = {"prompt": "a dog runs", "left_video": left, "right_video": right}
    records, _ = convert("GenAI-video", [{**row, "vote_type": vote} for vote in VOTES])
    assert winners(records) == ["Video 1", "Video 2", "Tie", "Tie"]
    assert names(records[1], tmp_path) == ["GenAI-video_000001_1.mp4", "GenAI-video_000001_2.mp4"]


def test_genai_bench_edits_have_a_source(convert):
    row = {"source_prompt": "a cat", "target_prompt": "a dog", "instruct_prompt": "make it a dog",
           "source_image": Image.new("RGB", (8, 8), "lime"),
           "left_output_image": Image.new("RGB", (8, 8), "red"),
           "right_output_image": Image.new("RGB", (8, 8), "blue"), "vote_type": "rightvote"}
    [record], _ = convert("GenAI-edit", [row])
    assert record["prompt"] == "make it a dog" and record["winner"] == "Image 2"
    assert data.source_of(record)[0].getpixel((0, 0)) == (0, 255, 0)
    question = data.as_question(record)
    assert question.media_2[0].getpixel((0, 0)) == (0, 0, 255)


def mmrb2(chosen, prompt, first, second):
    """A pair in the form of MMRB2's t2i.json and edit.json."""
    return {"id": "p", "chosen": chosen, "prompt_content": prompt,
            "response_a": {"model_name": "x", "response_content": first},
            "response_b": {"model_name": "y", "response_content": second}}


def test_mmrb2_images(convert, make, tmp_path):
    text = [["text", "a cat"]]
    a, b = ["image", make("images/p_0.jpg")], ["image", make("images/p_1.jpg")]
    rows = [mmrb2("A", text, [a], [b]), mmrb2("B", text, [a], [b]), mmrb2("", text, [a], [b]),
            mmrb2("A", text, [a, ["text", "Here it is."]], [b]), mmrb2("A", text, [], [b])]
    records, printed = convert("MMRB2-image", rows)
    assert winners(records) == ["Image 1", "Image 2"] and "source" not in records[0]
    assert [record["prompt"] for record in records] == ["a cat", "a cat"]
    assert names(records[1], tmp_path) == ["images/p_0.jpg", "images/p_1.jpg"]
    assert printed == ["MMRB2-image: 2 written", "MMRB2-image: 1 left out, chosen is ''",
                       "MMRB2-image: 2 left out, not one medium a side and one source"]


def test_mmrb2_edits_by_the_page_s_own_lines(public_sets, make, tmp_path, monkeypatch, capsys):
    """A pair with several sources is left out, and said so."""
    for file in ("input_images/s.jpg", "images/a.jpg", "images/b.jpg"):
        make(f"MMRB2/benchmark/{file}")
    source = ["image", "input_images/s.jpg"]
    a, b = ["image", "images/a.jpg"], ["image", "images/b.jpg"]
    rows = [mmrb2("B", [source, ["text", "add a hat"]], [a], [b]),
            mmrb2("A", [source, source, ["text", "blend them"]], [a], [b])]
    (tmp_path / "MMRB2/benchmark/edit.json").write_text(json.dumps({"pairs": rows}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "public_sets", public_sets)
    exec(USAGE, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["MMRB2-edit: 1 written",
                       "MMRB2-edit: 1 left out, not one medium a side and one source"]
    data.main(["check", "MMRB2/benchmark/pairs.jsonl"])
    [record] = data.read_records("MMRB2/benchmark/pairs.jsonl", "pair")
    assert record["winner"] == "Image 2" and record["prompt"] == "add a hat"
    assert record["source"].name == "s.jpg"
    assert [path.name for path in record["images"]] == ["a.jpg", "b.jpg"]


def test_mj_bench_video_counts_files_from_0_and_votes_from_1(convert, make, tmp_path):
    """"Video 1 better" is video_0_path: the authors' overall_train.py trains it as the chosen one,
    and in their test.json it has the better marks."""
    row = {"caption": "a dog runs", "video_0_path": make("test/0_0.mp4"),
           "video_1_path": make("test/0_1.mp4"), "category_preference": {}}
    votes = ["Video 1 better", "Video 2 better", "Same", "Hard to judge"]
    records, printed = convert("MJ-Bench-Video", [{**row, "overall_preference": v} for v in votes])
    assert winners(records) == ["Video 1", "Video 2", "Tie"]
    for record in records:
        assert names(record, tmp_path) == ["test/0_0.mp4", "test/0_1.mp4"]
    assert printed == ["MJ-Bench-Video: 3 written",
                       "MJ-Bench-Video: 1 left out, overall_preference is 'Hard to judge'"]


def test_videogen_rewardbench_is_a_csv(convert, make, tmp_path):
    """Its votes may have a space around them."""
    fields = ["path_A", "path_B", "A_model", "B_model", "prompt", "VQ", "MQ", "TA", "Overall"]
    a, b = make("videos/kling/1.mp4"), make("videos/minimax/1.mp4")
    with open(tmp_path / "videogen-rewardbench.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        for vote in ("A", "B ", "same", ""):
            writer.writerow([a, b, "kling", "minimax", "a ball, rolling", "B", "same", "B", vote])
    with open(tmp_path / "videogen-rewardbench.csv", newline="") as file:
        records, printed = convert("VideoGen-RewardBench", csv.DictReader(file))
    assert winners(records) == ["Video 1", "Video 2", "Tie"]
    assert records[0]["prompt"] == "a ball, rolling"
    assert names(records[0], tmp_path) == [a, b]
    assert printed[1:] == ["VideoGen-RewardBench: 1 left out, Overall is ''"]


def test_flex_sft_90k_is_read_as_it_is(make, tmp_path, capsys):
    """A LLaMA-Factory array; the form is the issue's, the set was not seen."""
    turns = [{"from": "human", "value": "<image><image>Which is better?"},
             {"from": "gpt", "value": '{"winner": "Image 1"}'}]
    row = {"conversations": turns, "images": [make("a.png"), make("b.png")]}
    (tmp_path / "sft.json").write_text(json.dumps([row, row]))
    data.main(["check", str(tmp_path / "sft.json")])
    assert "2 trace records with 2 images" in capsys.readouterr().out


def test_a_field_that_is_not_there_is_named(public_sets, tmp_path):
    with pytest.raises(KeyError, match="path2"):
        list(public_sets.records("HPDv3", [{"prompt": "a cat", "path1": "a.png"}], tmp_path))


def test_every_set_of_the_table_is_tested():
    code = (ROOT / "tests/test_public_sets.py").read_text()
    sets = re.findall(r'^    "([\w-]+)": "', SNIPPET, re.M)
    assert len(sets) == 9
    for name in sets:
        assert f'convert("{name}"' in code or name in USAGE, name
    assert max(map(len, SNIPPET.splitlines())) <= 100
