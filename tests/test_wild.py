"""Inputs from the wild: made-up files and texts, a line each, with the values that are right.

Expected values are worked out by hand: from the EXIF, MP4, PNG and JSON specifications, or by
counting. A row marked OPEN is right, but the code does not do it yet; the mark goes with the fix.
"""
import gzip
import io
import json
import os
import re
import struct
from codecs import BOM_UTF8

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
import reward
import sft
from test_reward import answer, category
from test_sft import small
from tiny_pipelines import make

OPEN = pytest.mark.xfail(strict=True)
WHITE, BLACK, RED, GREEN, BLUE = "ffffff", "000000", "ff0000", "00ff00", "0000ff"
NAMES = {"W": WHITE, "R": RED, "G": GREEN, "B": BLUE}


def rgb(color):
    return [int(color[i:i + 2], 16) for i in (0, 2, 4)]


# ---------------------------------------------------------------- pictures

PICTURES = [    # file name, mode, its left and right half as stored, how saved, as seen
    ("plain.png", "RGB", "red", "blue", {}, RED, BLUE),
    ("plain.bmp", "RGB", "red", "blue", {}, RED, BLUE),
    ("ü ß#1?%20.PNG", "RGB", "red", "blue", {}, RED, BLUE),
    ("图片.Jpg", "RGB", "red", "blue", {"format": "JPEG"}, RED, BLUE),
    ("jpeg inside.png", "RGB", "red", "blue", {"format": "JPEG"}, RED, BLUE),
    ("no suffix", "RGB", "red", "blue", {"format": "PNG"}, RED, BLUE),
    ("cmyk.jpg", "CMYK", (0, 255, 255, 0), (255, 255, 0, 0), {}, RED, BLUE),
    ("grey.jpg", "L", 0, 200, {}, BLACK, "c8c8c8"),
    ("bits.png", "1", 0, 1, {}, BLACK, WHITE),
    ("junk EXIF.jpg", "RGB", "red", "blue", {"exif": b"Exif\0\0garbage!"}, RED, BLUE),
    ("junk EXIF.png", "RGB", "red", "blue", {"exif": b"Exif\0\0garbage!"}, RED, BLUE),
    # transparency: on white; half of red on white is (255, 127, 127)
    ("rgba.png", "RGBA", (0, 0, 0, 0), (0, 0, 0, 255), {}, WHITE, BLACK),
    ("half.png", "RGBA", (255, 0, 0, 128), (9, 9, 9, 0), {}, "ff7f7f", WHITE),
    ("rgba.webp", "RGBA", (0, 0, 0, 0), (0, 0, 255, 255), {"lossless": True}, WHITE, BLUE),
    ("rgba.tif", "RGBA", (0, 0, 0, 0), (0, 0, 255, 255), {}, WHITE, BLUE),
    ("la.png", "LA", (0, 0), (0, 255), {}, WHITE, BLACK),
    ("palette.png", "P", 0, 1, {"transparency": 0}, WHITE, BLUE),
    ("alphas.png", "P", 0, 1, {"transparency": b"\x80\0"}, "ff7f7f", WHITE),
    ("palette.gif", "P", 0, 1, {"transparency": 0}, WHITE, BLUE),
    ("opaque.gif", "P", 0, 1, {}, RED, BLUE),
    ("key.png", "RGB", "red", "blue", {"transparency": (255, 0, 0)}, WHITE, BLUE),
    ("grey key.png", "L", 0, 200, {"transparency": 0}, WHITE, "c8c8c8"),
    # more than 8 bits have no one way to be seen
    ("16.png", "I;16", 25700, 65535, {}, None, None),
    ("16.tif", "I;16", 25700, 65535, {}, None, None),
    ("16.pgm", "I;16", 25700, 65535, {}, None, None),
    ("32.tif", "I", 600_000, 3_000_000, {}, None, None),
    ("float.tif", "F", .25, .5, {}, None, None)]


@pytest.mark.parametrize("name, mode, left, right, options, seen_left, seen_right", PICTURES)
def test_picture(name, mode, left, right, options, seen_left, seen_right, tmp_path):
    image = Image.new(mode, (32, 16), left)
    image.paste(Image.new(mode, (16, 16), right), (16, 0))
    if mode == "P":
        image.putpalette(rgb(RED) + rgb(BLUE))
    image.save(tmp_path / name, **options)
    if seen_left is None:
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            reward.load_media(tmp_path / name)
        return
    [image] = reward.load_media(tmp_path / name)
    assert image.mode == "RGB" and image.size == (32, 16)
    is_jpeg = name.endswith("jpg") or options.get("format") == "JPEG"
    for x, color in ((8, seen_left), (24, seen_right)):
        assert image.getpixel((x, 8)) == pytest.approx(rgb(color), abs=3 if is_jpeg else 0)


def quarters():
    """A picture of 48 x 32, its corners R G above B W."""
    image = Image.new("RGB", (48, 32), "#" + WHITE)
    for color, place in ((RED, (0, 0)), (GREEN, (24, 0)), (BLUE, (0, 16))):
        image.paste(Image.new("RGB", (24, 16), "#" + color), place)
    return image


def corners(image):
    """"RGBW": what is seen top left, top right, bottom left and bottom right."""
    seen = ""
    for y in (image.height // 4, image.height * 3 // 4):
        for x in (image.width // 4, image.width * 3 // 4):
            pixel = np.array(image.getpixel((x, y)))
            seen += min(NAMES, key=lambda name: abs(pixel - rgb(NAMES[name])).sum())
    return seen


ORIENTED = {1: "RGBW", 2: "GRWB", 3: "WBGR", 4: "BWRG", 5: "RBGW", 6: "BRWG", 7: "WGBR", 8: "GWRB"}


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_orientation(kind, orientation, tmp_path):
    """EXIF says at which side the 0th row and column are: 6 is right and top."""
    exif = Image.Exif()
    exif[0x112] = orientation
    quarters().save(tmp_path / f"a.{kind}", exif=exif)
    [image] = reward.load_media(tmp_path / f"a.{kind}")
    assert corners(image) == ORIENTED[orientation]
    assert image.size == ((32, 48) if orientation > 4 else (48, 32))


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp", "tif"])
@pytest.mark.parametrize("size", [(1, 1), (200, 1), (1, 200), (201, 1), (1, 201), (2, 401)])
def test_size(kind, size, tmp_path):
    Image.new("RGB", size).save(tmp_path / f"a.{kind}")
    if max(size) <= 200:
        assert reward.load_media(tmp_path / f"a.{kind}")[0].size == size
    else:
        with pytest.raises(ValueError, match=f"a.{kind}: .*200"):
            reward.load_media(tmp_path / f"a.{kind}")


@pytest.mark.parametrize("kind, num, options", [
    ("gif", 3, {"disposal": 2}), ("webp", 3, {"lossless": True}), ("apng", 3, {"format": "PNG"}),
    ("png", 1, {})])
def test_moving_picture(kind, num, options, tmp_path):
    """A red dot of 2 x 2 wanders over nothing, a pixel to the right in every frame."""
    frames = []
    expected = np.full((3, 8, 8, 3), 255)
    for i in range(3):
        frames.append(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
        frames[i].paste((255, 0, 0, 255), (i, 0, i + 2, 2))
        expected[i, :2, i:i + 2] = rgb(RED)
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(np.stack(reward.load_media(tmp_path / f"a.{kind}")), expected[:num])


# ---------------------------------------------------------------- clips and damaged files

def write_clip(path, matrix=(1, 0, 0, 1), skipped=0):
    """An mp4 of six frames. The display matrix (a, b, c, d) of its tkhd box moves a pixel (x, y)
    to (a x + c y, b x + d y) (ISO 14496-12); its edit list leaves out the first frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as video:
        stream = video.add_stream("mpeg4", rate=8, options={"g": "1"})
        stream.width, stream.height = quarters().size
        for i in range(6):
            video.mux(stream.encode(av.VideoFrame.from_image(quarters())))
        video.mux(stream.encode())
        ticks = stream.time_base.denominator // 8
    content = bytearray(file.getvalue())
    at = content.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", content, at) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = [value << 16 for value in matrix]
    struct.pack_into(">5i", content, at, a, b, 0, c, d)
    at = content.index(b"elst") + 12
    duration, start = struct.unpack_from(">2i", content, at)
    struct.pack_into(">2i", content, at, duration * (6 - skipped) // 6, start + skipped * ticks)
    path.write_bytes(content)


@pytest.mark.parametrize("matrix, size, seen", [
    ((1, 0, 0, 1), (48, 32), "RGBW"), ((0, 1, -1, 0), (32, 48), "BRWG"),        # clockwise
    ((-1, 0, 0, -1), (48, 32), "WBGR"), ((0, -1, 1, 0), (32, 48), "GWRB"),
    pytest.param((-1, 0, 0, 1), (48, 32), "GRWB", marks=OPEN),                  # mirrored
    pytest.param((1, 0, 0, -1), (48, 32), "BWRG", marks=OPEN),
    pytest.param((0, 1, 1, 0), (32, 48), "RBGW", marks=OPEN),
    pytest.param((0, -1, -1, 0), (32, 48), "WGBR", marks=OPEN)])
def test_clip_is_upright(matrix, size, seen, tmp_path):
    write_clip(tmp_path / "a.mp4", matrix)
    frames = reward.load_media(tmp_path / "a.mp4", 4)
    assert [frame.size for frame in frames] == [size] * 4
    assert {corners(frame) for frame in frames} == {seen}


@pytest.mark.parametrize("skipped", [0, 2])
def test_clip_with_an_edit_list(skipped, tmp_path):
    write_clip(tmp_path / "a.mp4", skipped=skipped)
    assert len(reward.load_media(tmp_path / "a.mp4", 99)) == 6 - skipped


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp", "tif", "mp4"])
@pytest.mark.parametrize("damage", [
    lambda good: b"", lambda good: b"no picture", lambda good: bytes(len(good)),
    lambda good: good[:len(good) // 2], lambda good: good[40:], gzip.compress],
    ids=["empty", "text", "zeros", "half", "headless", "gzip"])
def test_damaged_file(kind, damage, tmp_path):
    path = tmp_path / f"damaged.{kind}"
    if kind == "mp4":
        write_clip(path)
    else:
        Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    assert reward.load_media(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        reward.load_media(path)
    records, _ = write_records(tmp_path, "prompt", lines({"prompt": "p", "source": "a b.png"},
                                                         {"prompt": "p", "source": path.name}))
    with pytest.raises(SystemExit, match=f"r.jsonl:2: .*{path.name}: not a readable"):
        data.main(["check", str(records)])


def test_check_opens_every_frame_of_a_folder(tmp_path):
    """Of 20 frames a judge is shown 8: numbers 0, 3, 5, 8, 11, 14, 16 and 19."""
    path, _ = write_records(tmp_path, None, lines({**PAIR, "images": [], "videos": ["clip"] * 2}))
    for i in range(20):
        Image.effect_noise((32, 32), 80).save(tmp_path / "clip" / f"{i}.png")
    data.main(["check", str(path)])
    frame = tmp_path / "clip" / "7.png"
    frame.write_bytes(frame.read_bytes()[:-200])
    assert len(reward.load_media(tmp_path / "clip")) == 8
    with pytest.raises(SystemExit, match="r.jsonl:1: .*clip/7.png: not a readable"):
        data.main(["check", str(path)])


# ---------------------------------------------------------------- records

PAIR = {"prompt": "a", "images": ["a.png", "a b.png"], "winner": "Image 1"}
TASK = {"instruction": "Look.", "images": ["a.png"], "output": "red"}
CHAT = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "red"}]
ONE = b'{"prompt": "a"}'
TWO = [{"prompt": "a"}, {"prompt": "a", "source": "a.png"}]
WON = {"Image 1": ["A", "[[A>B]]", "[[A>>B]]", " Image 1\n", "Video 1"], "Image 2": [
    "b", "image_2", "[[B>A]]", "[[A<<B]]", "Image 2 is better"], "Tie": [
    "same", "[[A=B]]", "[[A=B=Bad]]", "[[C]]"]}
NO_WINNERS = ["Video 1 better", "0", "1", "2", "1.0", "1.", 1, None, True, ["Image 1"], "", "not A",
              "neither", "Image 3", "Image 1, Image 2", "[[D]]"]
TOKENS = ["<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "</s>", "<eos>", "\0",
          "<start_of_turn>", "<image>", "<IMG_CONTEXT>", "<start_of_image>", "[IMG]", "\ud83d",
          "\ude00"]
NO_FILES = ["", " ", None, "clip", ".", 1, "c.png", "a.png/b.png", "http://x/a.png", "a\0.png",
            "x" * 300, "data:image/png;base64," + "A" * 5000, {"path": "a.png", "bytes": None},
            {"path": None, "bytes": "A" * 5000}, ["a.png"]]


def lines(*records):
    return "\n".join(map(json.dumps, records)).encode()


def pair(**changes):
    return lines(PAIR, {**PAIR, **changes})


def task(**changes):
    return lines(TASK, {**TASK, **changes})


def chat(*messages, **changes):
    return lines({"messages": messages, "images": ["a.png"], **changes})


READ = [    # kind, content of the file, what its last record holds
    ("prompt", BOM_UTF8 + ONE, {"prompt": "a"}),
    ("prompt", BOM_UTF8 + b"\n\r\n" + ONE + b"\r\n\r\n" + ONE + b"\r\n", {"prompt": "a"}),
    ("prompt", b"[" + ONE + b",\n" + ONE + b"]\n", {"prompt": "a"}),
    ("prompt", BOM_UTF8 + b"\n[\n" + ONE + b"\n]", {"prompt": "a"}),
    ("prompt", '{"prompt": "é 图"}'.encode(), {"prompt": "é 图"}),
    ("prompt", b'{"prompt": "\\ud83d\\ude00"}', {"prompt": "\U0001f600"}),       # a whole emoji
    ("prompt", b'{"prompt": "<3 a <b> | <|> <| x |> s>"}', {"prompt": "<3 a <b> | <|> <| x |> s>"}),
    ("txt", BOM_UTF8 + b"\na cat\r\n\r\n [a dog] \r\n", {"prompt": "[a dog]"}),
    *[(None, pair(winner=text), {"winner": winner}) for winner in WON for text in WON[winner]],
    (None, pair(images=[], videos=["clip", "clip"]), {"winner": "Video 1"}),
    (None, pair(videos=[]), {"images": ["a.png", "a b.png"]}),
    (None, pair(videos=None), {"images": ["a.png", "a b.png"]}),
    (None, pair(images=["ü #1?.PNG", "a.png"]), {"images": ["ü #1?.PNG", "a.png"]}),
    (None, task(), {"instruction": "Look.", "response": "red"}),
    (None, task(input="x", system="s"), {"instruction": "s\n\nLook.\n\nx", "response": "red"}),
    (None, task(input="", system=None, history=[]), {"instruction": "Look.", "response": "red"}),
    (None, task(instruction="<image>\nLook.", input="x"), {"instruction": "Look.\n\nx"}),
    (None, chat(*CHAT, system="s"), {"instruction": "s\n\nLook.", "response": "red"}),
    (None, lines({"prompt": "a", "image": "a.png"}), {"images": ["a.png"]}),
    ("prompt", lines(*[{**TWO[1], "images": []}] * 2), {"source": "a.png"})]

REFUSED = [     # kind, content of the file, the line that is named, words
    ("prompt", ONE.decode().encode("utf-16"), 1, "not UTF-8"),
    ("prompt", ONE.decode().encode("utf-16-le"), 1, "not JSON"),
    ("prompt", ONE + '\n{"prompt": "é"}'.encode("latin-1"), 2, "not UTF-8"),
    ("prompt", '[{"prompt": "é"}]'.encode("latin-1"), None, "not a JSON array"),
    ("prompt", gzip.compress(ONE), 1, "not UTF-8"),
    ("prompt", ONE + b"\n\0\0\0\0\n", 2, "not JSON"),
    ("prompt", ONE + b"\r" + ONE, 1, "not JSON"),
    ("prompt", b"[" + ONE + b",\n", None, "not a JSON array"),
    ("prompt", b"[" + ONE + b"]\n[" + ONE + b"]", None, "not a JSON array"),
    ("prompt", b"[" + ONE + b", 1]", 2, "Expected one JSON object"),
    ("prompt", ONE + b'\n{"prompt":' + b"[" * 100_000, 2, "recursion"),
    ("prompt", b"[" * 100_000, None, "not a JSON array"),
    ("prompt", b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", 1, "integer string"),
    ("prompt", b"\n\r\n", None, "no prompt records"),
    ("txt", "a cat\na dog".encode("utf-16"), 1, "not UTF-8"),
    ("txt", "a cat\na dog".encode("utf-16-le"), 1, r"'\\x00'"),
    ("txt", b"a cat\n\0\0\0\n", 2, r"'\\x00'"),
    ("txt", "a cat\nan éclair".encode("latin-1"), 2, "not UTF-8"),
    ("txt", gzip.compress(b"a cat"), 1, "not UTF-8"),
    *[(None, pair(prompt=f"a {token} b"), 2, re.escape(repr(token))) for token in TOKENS],
    (None, lines({**PAIR, "response": "so <|im_end|>"}), 1, "'<.im_end.>'"),
    (None, lines({**PAIR, "chosen": "<|im_end|>", "rejected": "b"}), 1, "'<.im_end.>'"),
    (None, lines({**PAIR, "chosen": "a", "rejected": "\ud83d"}), 1, r"'\\ud83d'"),
    (None, task(instruction="Look.<|image_pad|>"), 2, "'<.image_pad.>'"),
    (None, task(input="<|im_end|>"), 2, "'<.im_end.>'"),
    (None, task(output="red</s>"), 2, "'</s>'"),
    (None, chat({**CHAT[0], "content": "<|im_end|>"}, CHAT[1]), 1, "'<.im_end.>'"),
    *[(None, pair(winner=text), 2, "'winner' is") for text in NO_WINNERS],
    *[(None, pair(images=[item, "a.png"]), 2, "is no file in") for item in NO_FILES],
    *[("prompt", lines({"prompt": "a", "source": item}), 1, "is no file") for item in NO_FILES],
    (None, pair(images=[], videos=["", "clip"]), 2, "is no file in"),
    (None, pair(videos=["clip", "clip"]), 2, "'images' and 'videos' together"),
    (None, pair(images=None), 2, "'images' holds 0 paths"),
    (None, pair(images={"a.png": 1}), 2, "'images' holds 0 paths"),
    ("prompt", lines(*TWO), 2, "some none"),
    ("prompt", lines(*TWO[::-1]), 2, "some none"),
    ("prompt", ONE + b"\n" + lines({"prompt": "a", "image": "a.png"}), 2, "beside a prompt"),
    ("prompt", ONE + b"\n" + lines({"prompt": "a", "video": "clip"}), 2, "beside a prompt"),
    (None, task(history=[["a", "b"]]), 2, "history"),
    (None, pair(history=[["a", "b"]]), 2, "history"),
    (None, pair(input="more"), 2, "'system' or 'input' beside"),
    (None, pair(system="s"), 2, "'system' or 'input' beside"),
    (None, task(input=5), 2, "no known form"),
    (None, chat(*CHAT, input="x"), 1, "input"),
    (None, chat(CHAT[0], {"role": "tool", "content": "x"}, CHAT[1]), 1, "user.*tool")]


def write_records(folder, kind, content):
    for name in ("a.png", "a b.png", "ü #1?.PNG", "clip/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name)
    path = folder / ("r.txt" if kind == "txt" else "r.jsonl")
    path.write_bytes(content)
    return path, "prompt" if kind == "txt" else kind


@pytest.mark.parametrize("kind, content, expected", READ, ids=range(len(READ)))
def test_record_is_read(kind, content, expected, tmp_path, capsys):
    path, kind = write_records(tmp_path, kind, content)
    record = data.read_records(path, kind)[-1]
    for name, value in expected.items():
        if name == "images":
            value = [tmp_path / item for item in value]
        assert record[name] == (tmp_path / value if name == "source" else value)
    data.main(["check", str(path)])
    assert "all well formed" in capsys.readouterr().out


@pytest.mark.parametrize("kind, content, line, words", REFUSED, ids=range(len(REFUSED)))
def test_record_is_refused(kind, content, line, words, tmp_path):
    path, kind = write_records(tmp_path, kind, content)
    message = rf"{re.escape(str(path))}:{f'{line}:' if line else ''} .*{words}"
    with pytest.raises(ValueError, match=message):
        data.read_records(path, kind)
    if kind is None:
        with pytest.raises(SystemExit, match=message):
            data.main(["check", str(path)])


# ---------------------------------------------------------------- judges and training

@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "\ud83d"])
def test_judges_and_stages_refuse_control_tokens(token, judge_folder, tmp_path):
    image = Image.new("RGB", (48, 48))
    words = re.escape(repr(token))
    with pytest.raises(ValueError, match=words):
        reward.LocalJudge(judge_folder)([reward.Comparison(f"a {token}", [image], [image])])
    processor = reward.load_processor(judge_folder)
    with pytest.raises(ValueError, match=words):
        data.encode(processor, [{"prompt": "a", "images": [image] * 2}], [f"so {token}"])
    path, _ = write_records(tmp_path, None, pair(prompt=token))
    (tmp_path / "judge.py").write_text("def ask(questions):\n    return [''] * len(questions)")
    with pytest.raises(SystemExit, match="r.jsonl:2: .*" + words):
        data.main(["eval", str(path), "--model", f"{tmp_path}/judge.py:ask"])


@pytest.mark.parametrize("family, seen", [("SD1.5", 75), ("SDXL", 75), ("Wan 2.1", 30)])
def test_prompts_that_are_cut_are_reported(family, seen, capsys):
    """A letter is a token; 77 or 32 are taken, the first and the last of them marks."""
    pipe, call = make(family)
    pipe = data.drive(pipe, torch.device("cpu"))

    def latents(prompt):
        options = {**call, "num_inference_steps": 1, "output_type": "latent"}
        generator = data.seeded_generator(0)
        return data.run_pipeline(pipe, prompt=[prompt], generator=generator, **options)[0]
    start = "a" * (seen - 1)
    assert not torch.equal(latents(start + "b"), latents(start + "c"))
    assert torch.equal(latents(start + "ab"), latents(start + "ac"))
    prompts = [start, start + "a", start + "ab", start * 9]
    records = [{"prompt": prompt, "where": f"p:{i}"} for i, prompt in enumerate(prompts, 1)]
    data.report_long_prompts(pipe, records[:2], call)
    assert capsys.readouterr().out == ""
    data.report_long_prompts(pipe, records, call)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"2 of 4 prompts have more than the {seen + 2} tokens")
    assert line.endswith("p:3")


@pytest.mark.parametrize("family", ["SD1.5", "FLUX.1", "Wan 2.1"])
@pytest.mark.parametrize("size", [(96, 32), (32, 96)])
def test_media_are_cropped_not_squashed(family, size):
    """All is green but for both ends of the longer side."""
    pipe, call = make(family)
    green = Image.new("RGB", (32, 32), (0, 255, 0))
    image = Image.new("RGB", size, "red")
    image.paste((0, 255, 0), (16, 0, 80, 32) if size == (96, 32) else (0, 16, 32, 80))
    latents = []
    for frame in (image, green, image.resize((32, 32))):
        latents.append(data.encode_media(pipe, [[frame] * call.get("num_frames", 1)], call))
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[2], latents[1])


def test_help_says_that_media_are_cropped(capsys):
    with pytest.raises(SystemExit):
        sft.main(["--help"])
    assert "crop" in capsys.readouterr().out


def test_resume_after_the_data_changed(judge_folder, toy_folder, tmp_path):
    records = data.read_records(f"{toy_folder}/traces.jsonl", "trace")
    path = tmp_path / "traces.jsonl"
    data.write_jsonl(path, records)
    args = [*small(toy_folder), "--model", judge_folder, "--data", str(path), "--max-steps", "1",
            "--out", str(tmp_path / "run"), "--resume"]
    sft.main(args)
    os.utime(path, (0, 0))
    sft.main(args)                                   # touched, the same content
    data.write_jsonl(path, records[::-1])
    with pytest.raises(ValueError, match="digest of --data"):
        sft.main(args)


# ---------------------------------------------------------------- verdicts and traces

def verdict(winner, *winners):
    categories = [category(f"{name}. x", f"Image {w}") for name, w in zip("ABC", winners)]
    return json.dumps(answer(f"Image {winner}", categories=categories))


DRAFT = verdict(1, 2, 2, 2)
FINAL = verdict(1, 1, 1, 2)
TWICE = FINAL.replace('"cat_winner": "Image 1"', '"cat_winner": "Image 1", "cat_winner": "Image 2"')
NONE = [None] * 3


@pytest.mark.parametrize("text, winner, winners", [
    (FINAL, 1, [1, 1, 2]), (DRAFT + "\n" + FINAL, 1, [1, 1, 2]), (FINAL + DRAFT, 1, [2, 2, 2]),
    (DRAFT + " Wait. " + FINAL + " Done.", 1, [1, 1, 2]), (verdict(1, 2) + FINAL, 1, [1, 1, 2]),
    (verdict(2, 1, 1, 2) + FINAL, None, [1, 1, 2]), (DRAFT[:-9] + "\n" + FINAL, None, NONE),
    (TWICE, 1, [None, None, 2]), (TWICE.replace('Image 2"', 'Image 1"'), 1, [1, 1, 1]),
    (FINAL[:-1] + ', "winner": "Image 2"}', None, [1, 1, 2]),
    ("[[A>B]]", 1, NONE), ("So: [[B>>A]].", 2, NONE), ("[[A<B]]", 2, NONE), ("[[A=B]]", 0, NONE),
    ("[[A=B=Bad]]", 0, NONE), ("[[C]]", 0, NONE), ("[[A>B]] or [[B>A]]", None, NONE),
    ("[[D]]", None, NONE)])
def test_verdict(text, winner, winners):
    found = reward.parse_verdict(text)
    assert found.winner == winner and [found.winner_on(anchor) for anchor in "ABC"] == winners


@pytest.mark.parametrize("text, value", [
    ("Final Score: 4", 4), ("Final Score: 3/5", 3), ("Final Score: 8/10", 4),
    ("Final Score: 80 / 100", 4), ("**Final Score:** 0/10", 0), ("Final Score: 8/10/2", None),
    ("Final Score: 8/10, so Final Score: 4", 4), ("Final Score: 8/10\nFinal Score: 3", None),
    ("Style Score: 3/5\nAlignment Score: 8/10", 3.5), ("Final Score: 8 out of 10", None),
    ("Style Score (1-5): 4\nAlignment Score: 8/10", 4), ("Final Score: 80%", None),
    ("Style Score (1-5): 4\nAlignment Score (1-10): 4", 3), ("Final Score (1-10): 8", 4),
    ("Final Score (1-0): 4", None), ("Style Score (0-00): 4", None),
    ("Style Score: 4\nAlignment Score: 8 out of 10", None)])
def test_score(text, value):
    assert reward.parse_score(text) == value


DROPPED = [     # of a pair whose winner is the first
    "{Image 1, Image 2}: " + FINAL, FINAL + " so {that} is", FINAL + FINAL, FINAL + "\n" + FINAL,
    DRAFT + "\n" + FINAL, f"[{FINAL}]", FINAL[:-1] + ",}", FINAL[:-1], FINAL[1:],
    FINAL + '{"a": 1}', '{"a": 1}' + FINAL, verdict(1, 1, 1), verdict(2, 1, 1, 2),
    FINAL[:-1] + ', "winner": "Tie"}', FINAL.replace("since", "<|im_end|>"),
    FINAL.replace("since", "\ud83d"), "<think>" + FINAL, "", reward.Failure(FINAL)]


@pytest.mark.parametrize("text, trace", [
    (FINAL, FINAL), (f"```json\n{FINAL}\n```", FINAL), (f"So: {FINAL} Done.", FINAL),
    (f"<think>{{x}}</think>{FINAL}", FINAL), (FINAL + " I think {so", FINAL),
    *[(text, None) for text in DROPPED]])
def test_trace_is_one_whole_object_or_dropped(text, trace):
    case, found = data.read_trace(text, 1)
    assert found == trace and (case == "right") == (trace is not None)
