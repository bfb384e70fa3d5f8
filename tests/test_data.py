"""Records, their errors, order and batches, a judge's accuracy."""
import json
import math

import pytest
import torch
from PIL import Image

import data
import toy_world as W
from reward import Comparison, Failure, build_messages, instruction, load_processor
from test_reward import GOOD, answer


def write(folder, *rows):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (48, 48), name[0] == "a" and "red" or "blue").save(folder / name)
    path = folder / "records.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


PAIR = {"prompt": "a red circle", "images": ["a.png", "b.png"], "winner": "Image 1"}


@pytest.mark.parametrize("kind, bad, message", [
    ("pair", {**PAIR, "winner": "Image 3"},
     r"records.jsonl:2: 'winner' is 'Image 3'. Expected Image 1"),
    ("pair", {**PAIR, "prompt": " "}, r":2: 'prompt' is ' '"),
    ("pair", {**PAIR, "images": ["a.png"]}, r":2: 'images' holds 1 paths. A pair record needs 2"),
    ("pair", {**PAIR, "images": ["a.png", "c.png"]},
     r":2: 'c.png' is no file in .*\. Paths are relative"),
    ("pair", '{"prompt": ', r":2: not JSON"),
    ("pair", [1], r":2: a list. Expected one JSON object a line"),
    ("trace", {**PAIR}, r":2: 'response' is None"),
    ("preference", {**PAIR, "chosen": "x", "rejected": "x"}, r":2: 'chosen' equals 'rejected'"),
    ("pair", {**PAIR, "winner": ["Image 1"]}, r":2: 'winner' is \['Image 1'\]"),
    ("pair", {**PAIR, "images": 5}, r":2: 'images' holds 0 paths"),
    ("pair", {"question": "which?", "images": ["a.png", "b.png"], "winner": "Image 1"}, r":2: 'prompt' is None. A pair"),
])
def test_a_bad_line_is_named_with_the_fix(kind, bad, message, tmp_path):
    good = {**PAIR, "response": "r", "chosen": "c", "rejected": "d"}
    path = write(tmp_path, good, bad)
    with pytest.raises(ValueError, match=message):
        data.read_records(path, kind)


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl does not exist; `python tests/toy.py` writes"):
        data.read_records(tmp_path / "none.jsonl", "pair")
    with pytest.raises(ValueError, match="no pair records"):
        data.read_records(write(tmp_path, ""), "pair")


@pytest.mark.parametrize("kind", ["pair", "trace", "image", "score", "question"])
def test_toy_records_as_files_are_the_toy_records(kind, tmp_path):
    made = W.Records("test", kind, 3, 4)
    data.write_jsonl(tmp_path / "toy.jsonl", made)
    kind = {"score": "trace", "question": "trace"}.get(kind, kind)
    for a, b in zip(data.read_records(tmp_path / "toy.jsonl", kind), made, strict=True):
        assert all(a[k] == b[k] for k in ("prompt", "type", "winner", "response", "instruction") if k in b)
        assert [Image.open(path).tobytes() for path in a["images"]] == [image.tobytes() for image in b["images"]]


def test_prompts_come_from_text_and_jsonl(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\na dog, red\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog, red"}\n')
    for name in ("p.txt", "p.jsonl"):
        assert [r["prompt"] for r in data.read_records(tmp_path / name, "prompt")] == ["a cat", "a dog, red"]
    (tmp_path / "p.csv").write_text("id,prompt\n1,a cat\n")
    with pytest.raises(ValueError, match="p.csv:1: not JSON"):
        data.read_records(tmp_path / "p.csv", "prompt")


def test_check_command(tmp_path, capsys):
    data.main(["check", str(write(tmp_path, {**PAIR, "response": "r"}))])
    assert "records.jsonl: 1 trace records with 2 images, all well formed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"records.jsonl:1: 'winner' is 'X'"):
        data.main(["check", str(write(tmp_path, {**PAIR, "winner": "X"}))])


def test_written_records_read_back(tmp_path):
    pairs = list(W.Records("train", "pair", 3))
    data.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    for old, new in zip(pairs, data.read_records(tmp_path / "pairs.jsonl", "pair")):
        assert old["prompt"] == new["prompt"] and old["winner"] == new["winner"]
        assert [i.tobytes() for i in old["images"]] == [data.load_media(m)[0].tobytes() for m in new["images"]]


def test_order_covers_each_epoch_once_and_depends_on_the_seed():
    def steps(first, last, seed, size=4):
        return [i for step in range(first, last) for i in data.batch_indices(64, size, step, seed)]

    epoch = steps(0, 16, seed=1)
    assert sorted(epoch) == list(range(64)) and epoch == steps(0, 16, seed=1)
    assert epoch != steps(0, 16, seed=2)
    again = steps(16, 32, seed=1)
    assert sorted(again) == list(range(64)) and again != epoch
    assert steps(0, 4, seed=1, size=40) == (epoch + again + steps(32, 48, seed=1))[:160]    # steps over the end of an epoch, or two
    assert len(data.batch_indices(3, 8, 0, 0)) == 8


def test_labels_are_the_response_and_nothing_else(judge_folder):
    processor = load_processor(judge_folder)
    records = [W.Records("train", "trace", 2)[0], {"images": W.Records("train", "image", 2)[1]["images"], "instruction": "Describe.", "response": "a red star"}]
    batch = data.encode(processor, records, [r["response"] for r in records], "Compare: {prompt}")
    for row, record in zip(range(2), records):
        on = batch["labels"][row] != -100
        assert processor.tokenizer.decode(batch["labels"][row][on]) == record["response"] + processor.tokenizer.eos_token
        assert torch.equal(batch["input_ids"][row][on], batch["labels"][row][on])
        assert on.nonzero().diff(dim=0).eq(1).all()                             # one run of labels, at the end
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert (batch["input_ids"] == image_token).sum(1).tolist() == [18, 9]       # 9 tokens an image
    assert batch["image_grid_thw"].shape == (3, 3) and len(batch["pixel_values"]) == 3 * 36


def test_prompt_is_encoded_as_the_judge_encodes_it(judge_folder):
    processor, record = load_processor(judge_folder), W.Records("train", "trace", 1)[0]
    batch = data.encode(processor, [record], ["x"], "Compare: {prompt}")
    messages, images = build_messages(Comparison(record["prompt"], *[[i] for i in record["images"]]), "Compare: {prompt}")
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    asked = processor(text=[text], images=images, return_tensors="pt")
    n = asked["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :n], asked["input_ids"]) and (batch["labels"][:, :n] == -100).all()
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])


def test_nothing_is_truncated(judge_folder):
    processor, record = load_processor(judge_folder), {**W.Records("train", "trace", 1)[0], "where": "f.jsonl:7"}
    with pytest.raises(ValueError, match=r"f.jsonl:7: \d+ \+ \d+ tokens, the model takes 50"):
        data.encode(processor, [record], [record["response"]], "Compare: {prompt}", max_tokens=50)


@pytest.mark.parametrize("change, response", [
    ({"prompt": "a <|image_pad|>"}, "x"), ({}, "x<|im_end|>"), ({}, " ")])
def test_texts_that_would_break_the_chat_are_not_encoded(change, response, judge_folder):
    record = {**W.Records("train", "trace", 1)[0], **change}
    with pytest.raises(ValueError, match="is empty or holds a control token"):
        data.encode(load_processor(judge_folder), [record], [response], "Compare: {prompt}")


def test_frames_are_sampled_uniformly(tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
    assert [f.getpixel((0, 0))[0] for f in data.load_media(tmp_path, 5)] == [0, 4, 9, 14, 19]


# ---------------------------------------------------------------- what neighbours write

ASK, SAY = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dot."}
USER, REPLY = {"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A dot."}
PARTS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
ONE, ASKED = {"images": ["a.png"]}, {"images": ["a.png"], "instruction": "What is it?"}
OURS = instruction("a {cat}", "Image")


@pytest.mark.parametrize("kind, record, expected", [
    ("trace", {"conversations": [ASK, SAY], **ONE}, {**ASKED, "response": "A dot."}),                                   # ShareGPT
    ("trace", {"conversations": [{"from": "system", "value": "Be brief."}, {**ASK, "value": "What?"}, SAY], "image": "a.png"},
     {"images": ["a.png"], "instruction": "Be brief.\n\nWhat?", "response": "A dot."}),
    ("trace", {"system": "Be brief.", "conversations": [{"from": "human", "value": "What?"}, SAY], **ONE}, {**ONE, "instruction": "Be brief.\n\nWhat?", "response": "A dot."}),
    ("preference", {"conversations": [ASK], "chosen": SAY, "rejected": {**SAY, "value": "B"}, **ONE}, {**ASKED, "chosen": "A dot.", "rejected": "B"}),
    ("trace", {"messages": [USER, REPLY], **ONE}, {**ASKED, "response": "A dot."}),                                      # TRL
    ("trace", {"messages": [PARTS, {**REPLY, "content": [{"type": "text", "text": "A dot."}]}], **ONE}, {**ASKED, "response": "A dot."}),
    ("trace", {"prompt": [PARTS], "completion": [REPLY], **ONE}, {**ASKED, "response": "A dot."}),
    ("preference", {"prompt": [USER], "chosen": [REPLY], "rejected": [{**REPLY, "content": "B"}], **ONE}, {**ASKED, "chosen": "A dot.", "rejected": "B"}),
    ("preference", {"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "B"}], **ONE}, {**ASKED, "chosen": "A dot.", "rejected": "B"}),
    ("preference", {"prompt": "a cat", "chosen": "A dot.", "rejected": "B", "images": ["a.png", "b.png"]},
     {"prompt": "a cat", "chosen": "A dot.", "rejected": "B", "images": ["a.png", "b.png"]}),                            # which is ours
    ("trace", {"conversations": [{"from": "human", "value": f"<image><image>{OURS}"}, {"from": "gpt", "value": "{}"}], "images": ["a.png", "b.png"]},
     {"instruction": OURS, "images": ["a.png", "b.png"], "response": "{}"}),                                             # our question
    ("image", {"caption": "a cat", "image": "a.png"}, {"prompt": "a cat", "images": ["a.png"]}),
    ("trace", {"question": "What is it?", "image": "a.png", "response": "A dot."},
     {**ASKED, "response": "A dot."}),
])
def test_records_of_neighbours_are_read(kind, record, expected, tmp_path):
    path = write(tmp_path, record)
    found, = data.read_records(path, kind)
    assert data.read_records(path, None) == [found]                             # its kind is seen
    name = "videos" if "videos" in found else "images"
    assert {**found, name: [m.name for m in found[name]]} == {**expected, "where": f"{path}:1"}
    assert all(m == tmp_path / m.name for m in found[name])


@pytest.mark.parametrize("record, message", [
    ({"conversations": [ASK, SAY, ASK, SAY], **ONE},
     r":1: the turns are of \['user', 'assistant', 'user'\]: expected a user's"),
    ({"conversations": [{"from": "observation", "value": "x"}, SAY], **ONE},
     r":1: the turns are of \['observation'\]: expected a user's"),
    ({"conversations": [{"from": "human"}], **ONE}, r":1: a record of no known form \(KeyError\('value'\)\)"),
    ({"messages": [USER, REPLY], "images": ["a.png", "b.png"]},
     ":1: 1 of <image>, <video> for 2 media"),
    ({**PAIR, "images": ["http://x/a.png", "b.png"]},
     r":1: 'http://x/a.png' is no file in .*\. Paths are relative to the JSONL file; download what "
     "is a URL"),
    ({**PAIR, "images": [1, "b.png"]}, r":1: '1' is no file in .*\. Paths are relative"),
    ({"instruction": " ", **ONE, "response": "x"}, ":1: 'instruction' is ' '"),
    ({"instruction": "x", **ONE, "response": 5}, ":1: 'response' is 5. A trace record needs it as non-empty text"),
    ({"instruction": "where is <image>?", **ONE, "response": "x"},
     ":1: 1 of <image>, <video> for 1 media, or inside the text"),
    ({"question": "What is it?", **ONE}, ":1: 'prompt' is None"),
    ({"instruction": "What is it?"}, ":1: 'prompt' is None"),
    ({"messages": [{"role": "user", "content": "From <image> to <image>?"}, REPLY],
      "images": ["a.png", "b.png"]}, ":1: 2 of <image>, <video> for 2 media, or inside the text"),
    ({"prompt": "<image>What is it?", "chosen": "A dot.", "rejected": "B", **ONE}, ":1: 'images' holds 1 paths. A preference record needs 2"),
])
def test_unreadable_forms_are_named(record, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data.read_records(write(tmp_path, record), None)


def test_videos_are_files_or_folders_of_frames(tmp_path):
    """As they are, and named again by a file in another folder."""
    av = pytest.importorskip("av")
    image = Image.effect_noise((16, 16), 50).convert("RGB")
    (tmp_path / "f").mkdir()
    with av.open(str(tmp_path / "v.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 16
        for i in range(5):
            image.save(tmp_path / "f" / f"{i}.png")
            video.mux(stream.encode(av.VideoFrame.from_image(image)))
        video.mux(stream.encode())
    pair = {"prompt": "a red circle", "videos": ["v.mp4", "f"], "winner": "Video 2"}
    films = data.read_records(write(tmp_path, pair), "pair")
    data.write_jsonl(tmp_path / "again" / "pairs.jsonl", films)
    for record in films + data.read_records(tmp_path / "again" / "pairs.jsonl", "pair"):
        clips = data.as_question(record)
        assert len(clips.media_1) == len(clips.media_2) == 5 and clips.media_2[4].tobytes() == image.tobytes()
        assert data.as_question(record, swap=True).media_1[4].tobytes() == image.tobytes()


def test_an_instruction_is_encoded_as_it_is_behind_its_images(judge_folder):
    """reward.TEMPLATE about a prompt as an instruction gives the tokens of that prompt's comparison."""
    processor, record = load_processor(judge_folder), W.Records("train", "trace", 1)[0]
    ours = data.encode(processor, [record], [record["response"]])
    task = {"instruction": instruction(record["prompt"]), "images": record["images"]}
    theirs = data.encode(processor, [task], [record["response"]])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    ids = data.encode(processor, [{**task, "instruction": "From {prompt} to?"}], ["x"])["input_ids"][0]
    text = processor.tokenizer.decode(ids).replace(processor.image_token, "")
    assert "user\nImage 1<|vision_start|><|vision_end|>Image 2<|vision_start|><|vision_end|>From {prompt} to?<|im_end|>" in text


def test_padding_does_not_change_a_row(judge_folder):
    """Each row of a batch is the record encoded alone, padded on the right."""
    processor, records = load_processor(judge_folder), W.Records("train", "trace", 3)
    responses = ["x", records[1]["response"], "a red star"]
    batch = data.encode(processor, list(records), responses, "Compare: {prompt}")
    padding = {"input_ids": processor.tokenizer.pad_token_id, "labels": -100}
    for i, record in enumerate(records):
        alone = data.encode(processor, [record], [responses[i]], "Compare: {prompt}")
        for name in ("input_ids", "attention_mask", "labels", "mm_token_type_ids"):
            n = alone[name].shape[1]
            assert torch.equal(batch[name][i, :n], alone[name][0]) and (batch[name][i, n:] == padding.get(name, 0)).all()


def test_check_counts_what_a_file_holds(tmp_path, capsys):
    path = write(tmp_path, {**PAIR, "response": "12345"}, {**PAIR, "response": "123"}, {**PAIR, "chosen": "a", "rejected": "bb"}, PAIR, {**ASKED, "response": "1"})
    data.main(["check", str(path)])
    lines = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["2 trace records with 2 images, all well formed", "1 preference records with 2 images, all well formed",
                     "1 pair records with 2 images, all well formed", "1 trace records with 1 images, all well formed"]
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(SystemExit, match=r"records.jsonl:1: .*b.png: not a readable image or video"):
        data.main(["check", str(path)])


def test_files_in_one_folder_keep_their_own_images(tmp_path):
    made = [W.Records("train", "pair", 2, seed) for seed in (0, 1)]
    for seed in (0, 1):
        data.write_jsonl(tmp_path / f"{seed}.jsonl", made[seed])
    for seed in (0, 1):
        for a, b in zip(data.read_records(tmp_path / f"{seed}.jsonl", "pair"), made[seed], strict=True):
            assert [Image.open(path).tobytes() for path in a["images"]] == [image.tobytes() for image in b["images"]]


def test_paths_hold_wherever_a_file_is_read_and_written(tmp_path, monkeypatch):
    """A file read by a relative name and written to another folder names the same images."""
    write(tmp_path, PAIR)
    monkeypatch.chdir(tmp_path)
    data.write_jsonl("other/again.jsonl", data.read_records("records.jsonl", "pair"))
    again, = data.read_records("other/again.jsonl", "pair")
    assert [path.resolve() for path in again["images"]] == [(tmp_path / name).resolve() for name in ("a.png", "b.png")]
    assert not (tmp_path / "other/images").exists() and "\"where\"" not in (tmp_path / "other/again.jsonl").read_text()


# ---------------------------------------------------------------- a judge's accuracy

def colored(winner, prompt="p", colors=("red", "blue")):
    return {"prompt": prompt, "images": [Image.new("RGB", (8, 8), color) for color in colors], "winner": winner}


def is_red(frames):
    return frames[0].getpixel((0, 0))[0] == 255


def test_exam_separates_accuracy_from_position_bias():
    pairs = [colored("Image 1"), colored("Image 2", colors=("blue", "red"))] * 50               # red is better
    sees = lambda questions: [json.dumps(answer("Image 1" if is_red(question.media_1) else "Image 2")) for question in questions]
    result = data.evaluate_judge(sees, pairs)
    assert result["winner_accuracy"] == result["parse_rate"] == result["swap_consistency"] == 1
    assert result["first_position_share"] == .5 and result["failures"] == 0
    blind = data.evaluate_judge(lambda questions: [GOOD.replace("6", "5")] * len(questions), pairs)
    assert .35 < blind["winner_accuracy"] < .65 and blind["first_position_share"] == 1 and blind["swap_consistency"] == 0
    ties = pairs[:2] + [colored("Tie")] * 2
    assert data.evaluate_judge(sees, ties)["winner_accuracy"] == 1                           # ties are not asked
    mute = data.evaluate_judge(lambda questions: ["?"] * len(questions), ties)
    assert mute["winner_accuracy"] == mute["parse_rate"] == mute["tau_accuracy"] == mute["swap_consistency"] == 0 and math.isnan(mute["first_position_share"])
    assert data.evaluate_judge(lambda questions: [Failure("x")] * len(questions), ties)["failures"] == 8


def test_accuracy_with_and_without_ties():
    """tau counts ties, diff leaves them out: 4 pairs have a winner, 2 of them right; of all 6, 1 of 2 ties is right."""
    votes = [(1, "Image 1"), (2, "Image 1"), (2, "Image 2"), (0, "Image 2"), (0, "Tie"), (1, "Tie")]
    said = {f"prompt {i}": winner for i, (winner, _) in enumerate(votes)}

    def judge(questions):                            # winners are of the record, whatever the order; red is its first image
        turned = [said[q.prompt] if is_red(q.media_1) else {1: 2, 2: 1, 0: 0}[said[q.prompt]] for q in questions]
        return [json.dumps(answer(f"Image {winner}" if winner else "Tie")) for winner in turned]

    for seed in range(3):
        found = data.evaluate_judge(judge, [colored(label, prompt) for prompt, (_, label) in zip(said, votes)], seed)
        assert found["winner_accuracy"] == .5 and found["tau_accuracy"] == .5 and found["swap_consistency"] == 1
