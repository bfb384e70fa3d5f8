"""A fuzz of everything that is read: small made-up files and texts with bytes flipped, cut out and
put in. A file is read or refused in one ValueError with its name, a text has a winner or a score or
none of them. Anything else is printed, kept in the folder for temporary files, and ends in 1.

    python tests/bench_inputs.py [number of mutations of each kind, 500]         half a minute
"""
import io
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from PIL import Image

import conftest  # paths
import data
import reward
from test_reward import answer
from test_wild import CHAT, PAIR, TASK, write_clip

SLOW = 10.0                             # seconds; no small file takes that long
CASES = ["read", "refused", "anything else"]


# ------------------------------------------------------------------------------------------------
# what is damaged, and how

def saved(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def make_media(folder):
    """{file name: its bytes}: transparent, turned by EXIF, moving and grey pictures, a clip."""
    noise = Image.effect_noise((40, 24), 90)
    color = Image.merge("RGB", (noise, noise.rotate(90, expand=False), noise.rotate(180)))
    clear = color.copy()
    clear.putalpha(noise)
    exif = Image.Exif()
    exif[0x112] = 6
    frames = [clear.rotate(angle) for angle in (90, 180)]
    moving = {"save_all": True, "append_images": frames, "duration": 100}
    write_clip(folder / "clip.mp4", (0, 1, -1, 0))
    return {
        "a.png": saved(clear, format="PNG", exif=exif), "grey.png": saved(noise, format="PNG"),
        "a.jpg": saved(color, format="JPEG", exif=exif),
        "a.gif": saved(clear, format="GIF", **moving),
        "a.webp": saved(clear, format="WEBP", exif=exif, **moving),
        "a.bmp": saved(color, format="BMP"),
        "a.tif": saved(clear, format="TIFF", compression="tiff_lzw", exif=exif),
        "a.mp4": (folder / "clip.mp4").read_bytes()}


def make_records():
    """JSONL of every kind, our own and of other projects."""
    rows = [
        PAIR, {**PAIR, "images": [], "videos": ["clip", "clip"], "winner": "[[A>B]]"},
        {**PAIR, "response": "é \U0001f600"}, {**PAIR, "chosen": "a", "rejected": "b"},
        {"prompt": "a", "image": "a.png"}, {**TASK, "input": "x", "system": "s"},
        {"messages": CHAT, "images": ["a.png"]},
        {"conversations": [{"from": "human", "value": "<image>Look."},
                           {"from": "gpt", "value": "red"}], "image": "a.png"}]
    return {"r.jsonl": "\n".join(map(json.dumps, rows)).encode(),
            "r.json": json.dumps(rows, ensure_ascii=False, indent=1).encode(),
            "r.txt": "a cat\na dog, é\n".encode()}


def make_texts():
    """Verdicts and pointwise scores."""
    whole = json.dumps(answer())
    return {"verdict": whole.encode(), "draft and final": f"{whole}\nSo: {whole}".encode(),
            "sentence": b"<think>x</think>Therefore, Image 1 is better than Image 2. [[A>B]]",
            "scores": b"Alignment Score (1-5): 3.5\nStyle Score: 8/10\nFinal Score: 4/5"}


def mutate(content, rng):
    """The bytes after one to four flips, cuts and insertions."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        kind = rng.choice(["flip", "flip", "cut out", "cut off", "insert", "repeat"])
        if kind == "flip" and at < len(content):
            content[at] = rng.randrange(256)
        elif kind == "cut out":
            del content[at:at + rng.randint(1, 30)]
        elif kind == "cut off" and rng.random() < 0.3:
            del content[at:]
        elif kind == "insert":
            content[at:at] = rng.choice([rng.randbytes(4), b"\0" * 4, b"{[", b'"', b"\n", b"\xff"])
        elif kind == "repeat":
            content[at:at] = content[at:at + rng.randint(1, 30)]
    return bytes(content)


# ------------------------------------------------------------------------------------------------
# what is done with it

def read_media(path):
    """Whether it is read. AssertionError: as something else than RGB pictures."""
    frames = reward.load_media(path)
    assert frames and all(frame.mode == "RGB" and min(frame.size) > 0 for frame in frames)
    return True


def read_records(path):
    records = data.read_records(path, "prompt" if path.suffix == ".txt" else None)
    for record in records:
        for name in ("prompt", "instruction", "response", "chosen", "rejected"):
            reward.check_text(record.get(name, "none"))
        for item in record.get(data.medium_of(record), []):
            assert item.exists()
    return True


def read_text(path):
    """Whether a winner or a score is found. AssertionError: something is found that cannot be."""
    text = path.read_bytes().decode(errors="replace")
    verdict = reward.parse_verdict(text)
    assert verdict.winner in (None, 0, 1, 2)
    assert verdict.winner is not None or verdict.issues
    reward.format_verdict(verdict, "p")
    score = reward.parse_score(text)
    assert score is None or isinstance(score, float)
    case, trace = data.read_trace(text, 1)
    if trace is not None:
        assert case == "right" and isinstance(json.loads(trace), dict)
        assert reward.parse_verdict(trace).winner == 1
    return verdict.winner is not None or score is not None


def run(read, path):
    """The case of a file; what is no ValueError with its name is printed."""
    start = time.perf_counter()
    try:
        case = "read" if read(path) else "refused"
    except ValueError as error:
        case = "refused" if str(path) in str(error) else "anything else"
    except BaseException:
        case = "anything else"
    if case == "anything else":
        traceback.print_exc()
    if time.perf_counter() - start > SLOW:
        case = "anything else"
        print(f"{path} takes {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return case


def main(num=500):
    warnings.simplefilter("ignore")     # of damaged EXIF data and large pictures
    start = time.time()
    total = Counter()
    print(f"{'':18s}" + "".join(f"{case:>15s}" for case in CASES), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for picture in ("a.png", "a b.png", "clip/0.png"):
            (folder / picture).parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / picture)
        groups = [(read_media, make_media(folder)), (read_records, make_records()),
                  (read_text, make_texts())]
        for read, files in groups:
            for file, content in files.items():
                rng = random.Random(file)
                path = folder / f"damaged {file}"
                path.write_bytes(content)
                assert run(read, path) == "read", file
                counts = Counter()
                for number in range(num):
                    path.write_bytes(mutate(content, rng))
                    case = run(read, path)
                    counts[case] += 1
                    if case == "anything else":
                        Path(tempfile.gettempdir(), f"{number} {file}").write_bytes(
                            path.read_bytes())
                total += counts
                print(f"{file:18s}" + "".join(f"{counts[case]:15d}" for case in CASES), flush=True)
    print(f"{'all':18s}" + "".join(f"{total[case]:15d}" for case in CASES))
    print(f"{time.time() - start:.0f} s")
    sys.exit(1 if total["anything else"] else 0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
