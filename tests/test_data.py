"""Records, their errors, order and batches."""
import json

import pytest
import torch
from PIL import Image

import data
from reward import Comparison, build_messages, load_processor


def write(folder, *rows):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (48, 48), name[0] == "a" and "red" or "blue").save(folder / name)
    path = folder / "records.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


PAIR = {"prompt": "a red circle", "images": ["a.png", "b.png"], "winner": "Image 1"}


@pytest.mark.parametrize("kind, bad, message", [
    ("pair", {**PAIR, "winner": "Image 3"}, r"records.jsonl:2: 'winner' is 'Image 3'. Expected 'Image 1'"),
    ("pair", {**PAIR, "prompt": " "}, r":2: 'prompt' is ' '"),
    ("pair", {**PAIR, "images": ["a.png"]}, r":2: 'images' holds 1 paths. A pair record needs 2"),
    ("pair", {**PAIR, "images": ["a.png", "c.png"]}, r":2: .*c.png does not exist. Paths are relative"),
    ("pair", '{"prompt": ', r":2: not JSON"),
    ("pair", [1], r":2: a list. Expected one JSON object a line"),
    ("trace", {**PAIR}, r":2: 'response' is None"),
    ("preference", {**PAIR, "chosen": "x", "rejected": "x"}, r":2: 'chosen' equals 'rejected'"),
])
def test_a_bad_line_is_named_with_the_fix(kind, bad, message, tmp_path):
    good = {**PAIR, "response": "r", "chosen": "c", "rejected": "d"}
    path = write(tmp_path, good, bad)
    with pytest.raises(ValueError, match=message + r".*(Fix the line or pass --skip-bad|)"):
        data.read_records(path, kind)


def test_skip_bad_counts_what_it_drops(tmp_path, capsys):
    path = write(tmp_path, PAIR, {**PAIR, "winner": "both"}, PAIR)
    assert len(data.read_records(path, "pair", skip_bad=True)) == 2
    assert "1 bad lines skipped" in capsys.readouterr().err


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist. Give a JSONL file, or 'toy'"):
        data.read_records(tmp_path / "none.jsonl", "pair")
    with pytest.raises(ValueError, match="no pair records"):
        data.read_records(write(tmp_path, ""), "pair")


@pytest.mark.parametrize("kind", ["pair", "trace", "image", "prompt"])
def test_toy_records_as_files_are_the_toy_records(kind, tmp_path):
    data.main(["toy", str(tmp_path / "toy.jsonl"), "--kind", kind, "--split", "test", "--num", "3", "--seed", "4"])
    found, made = data.read_records(tmp_path / "toy.jsonl", kind), data.open_records("toy:test", kind, 3, 4)
    for a, b in zip(found, made, strict=True):
        assert all(a[k] == b[k] for k in ("prompt", "type", "winner", "response") if k in b)
        assert [Image.open(path).tobytes() for path in a.get("images", [])] == [image.tobytes() for image in b.get("images", [])]


def test_prompts_come_from_text_csv_and_jsonl(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\na dog, red\n")
    (tmp_path / "p.csv").write_text('id,prompt\n1,a cat\n2,"a dog, red"\n')
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog, red"}\n')
    for name in ("p.txt", "p.csv", "p.jsonl"):
        assert [r["prompt"] for r in data.read_records(tmp_path / name, "prompt")] == ["a cat", "a dog, red"]
    (tmp_path / "p.csv").write_text("id,text\n1,a cat\n")
    with pytest.raises(ValueError, match="p.csv:2: 'prompt' is None"):
        data.read_records(tmp_path / "p.csv", "prompt")


def test_check_command(tmp_path, capsys):
    data.main(["check", str(write(tmp_path, {**PAIR, "response": "r"}))])
    assert "1 trace records, all well formed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"records.jsonl:1: 'winner' is 'X'"):
        data.main(["check", str(write(tmp_path, {**PAIR, "winner": "X"}))])


def test_written_records_read_back(tmp_path):
    pairs = list(data.toy_world().Records("train", "pair", 3))
    data.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    for old, new in zip(pairs, data.read_records(tmp_path / "pairs.jsonl", "pair")):
        assert old["prompt"] == new["prompt"] and old["winner"] == new["winner"]
        assert [i.tobytes() for i in old["images"]] == [data.load_media(m)[0].tobytes() for m in new["images"]]


def test_order_covers_each_epoch_once_and_depends_on_the_seed():
    records = [{"prompt": "x" * (i % 5)} for i in range(64)]
    epoch = [i for step in range(16) for i in data.batch_indices(records, 4, step, seed=1)]
    assert sorted(epoch) == list(range(64))
    assert epoch == [i for step in range(16) for i in data.batch_indices(records, 4, step, seed=1)]
    assert epoch != [i for step in range(16) for i in data.batch_indices(records, 4, step, seed=2)]
    again = [i for step in range(16, 32) for i in data.batch_indices(records, 4, step, seed=1)]
    assert sorted(again) == list(range(64)) and again != epoch
    lengths = [{len(records[i]["prompt"]) for i in data.batch_indices(records, 4, step, 1, window=8)} for step in range(16)]
    assert sum(map(len, lengths)) < 40                                          # grouped by length: 64 would be no grouping


def test_labels_are_the_response_and_nothing_else(judge_folder):
    processor, world = load_processor(judge_folder), data.toy_world()
    records = [world.Records("train", "trace", 2)[0], {"images": world.Records("train", "image", 2)[1]["images"], "instruction": "Describe.", "response": "a red star"}]
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
    processor, record = load_processor(judge_folder), data.toy_world().Records("train", "trace", 1)[0]
    batch = data.encode(processor, [record], ["x"], "Compare: {prompt}")
    messages, images = build_messages(Comparison(record["prompt"], *[[i] for i in record["images"]]), "Compare: {prompt}")
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    asked = processor(text=[text], images=images, return_tensors="pt")
    n = asked["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :n], asked["input_ids"]) and (batch["labels"][:, :n] == -100).all()
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])


def test_nothing_is_truncated(judge_folder):
    processor, record = load_processor(judge_folder), {**data.toy_world().Records("train", "trace", 1)[0], "where": "f.jsonl:7"}
    with pytest.raises(ValueError, match=r"f.jsonl:7: \d+ \+ \d+ tokens, more than --max-tokens 50"):
        data.encode(processor, [record], [record["response"]], "Compare: {prompt}", max_tokens=50)
    with pytest.raises(ValueError, match="f.jsonl:7: the text holds the image placeholder"):
        data.encode(processor, [{**record, "prompt": "a <|image_pad|>"}], ["x"], "Compare: {prompt}")


def test_frames_are_sampled_uniformly(tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
    assert [f.getpixel((0, 0))[0] for f in data.load_media(tmp_path, 5)] == [0, 5, 10, 14, 19]
