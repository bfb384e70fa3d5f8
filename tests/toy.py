"""The toy world as files, as a user would bring them: JSONL with PNGs beside it, an untrained judge
and an untrained generator. The defaults of the stages name these files.

    python tests/toy.py                      writes out/toy; about a minute on two cores
    python tests/toy.py --world video        clips of three frames, out/toy-video

    traces.jsonl       verdicts to imitate: {"prompt", "type", "images", "winner", "response"}
    pairs.jsonl        what people prefer: {"prompt", "type", "images", "winner"}
    pairs_test.jsonl   the same of held-out prompts
    images.jsonl       captioned images: {"prompt", "type", "images"}
    prompts.txt        one a line, and prompts_test.txt, held-out ones
    images/            their PNGs; of clips "videos", folders of frames
    judge/             Qwen3-VL of 1.5M parameters, for from_pretrained
    generator/         FLUX of 1.8M parameters (of clips: Wan), for DiffusionPipeline
    toy.json           the options that the folder was made with

The same options write the same files, byte for byte.
"""
import argparse
import json
import multiprocessing
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tqdm import tqdm

import toy_video
import toy_world

WORLDS = {"image": toy_world, "video": toy_video}
NUM_PROCESSES = 2


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--world", choices=list(WORLDS), default="image", help="still images or clips")
    add("--seed", type=int, default=0, help="of all but the held-out records")
    add("--out", help="folder that is written  [out/toy, out/toy-video]")
    add("--num-traces", type=int, default=22400)
    add("--num-pairs", type=int, default=800)
    add("--num-images", type=int, default=16000, help="captioned images or clips")
    add("--num-prompts", type=int, default=4000)
    add("--num-eval-pairs", type=int, default=400)
    add("--num-eval-prompts", type=int, default=1024)
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = "out/toy" if args.world == "image" else "out/toy-video"
    return args


# ------------------------------------------------------------------------------------------------
# records

def save_medium(medium, folder, path):
    """Write an image as folder/path.png, or the frames of a clip into the folder folder/path.
    Returns the path relative to `folder`."""
    if not isinstance(medium, list):
        medium.save(folder / f"{path}.png", compress_level=1)
        return f"{path}.png"
    (folder / path).mkdir()
    for i, frame in enumerate(medium):
        frame.save(folder / path / f"{i}.png", compress_level=1)
    return path


def write_record(job):
    """Make a record, write its media and return it as a line of JSON. Called in a worker."""
    folder, world, name, split, kind, seed, i = job
    record = WORLDS[world].Records(split, kind, i + 1, seed)[i]
    field = f"{world}s"
    paths = []
    for k, medium in enumerate(record[field], 1):
        paths.append(save_medium(medium, folder, f"{field}/{name}_{i:06d}_{k}"))
    record[field] = paths
    return json.dumps(record) + "\n"


def write_prompts(path, world, split, num, seed):
    with open(path, "w") as file:
        for record in WORLDS[world].Records(split, "prompt", num, seed):
            file.write(record["prompt"] + "\n")


def write_models(folder, world, seed):
    import diffusers                                 # and torch: what the workers do without
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    import toy_models
    judge, processor = toy_models.make_judge(seed, world=WORLDS[world])
    toy_models.save_judge(folder / "judge", judge, processor, WORLDS[world])
    pipe = toy_models.GENERATORS[world](seed)
    toy_models.save_generator(folder / "generator", pipe)


def write_all(folder, args):
    """Write all files into an empty folder: the records in workers, meanwhile the models here."""
    files = [("traces", "train", "trace", args.num_traces, args.seed),
             ("images", "train", "image", args.num_images, args.seed),
             ("pairs", "train", "pair", args.num_pairs, args.seed),
             ("pairs_test", "test", "pair", args.num_eval_pairs, 1)]
    (folder / f"{args.world}s").mkdir()
    # spawn: a worker starts without the threads and locks of this process
    with multiprocessing.get_context("spawn").Pool(NUM_PROCESSES) as pool:
        lines = []
        for name, split, kind, num, seed in files:
            jobs = [(folder, args.world, name, split, kind, seed, i) for i in range(num)]
            lines.append(pool.imap(write_record, jobs, chunksize=32))
        write_models(folder, args.world, args.seed)
        write_prompts(folder / "prompts.txt", args.world, "train", args.num_prompts, args.seed)
        write_prompts(folder / "prompts_test.txt", args.world, "test", args.num_eval_prompts, 7)
        for (name, _, _, num, _), its_lines in zip(files, lines):
            with open(folder / f"{name}.jsonl", "w") as file:
                file.writelines(tqdm(its_lines, name, num))


# ------------------------------------------------------------------------------------------------

def next_command(args):
    """How the first stage trains on what was written."""
    out = Path(args.out)
    if out == Path("out/toy"):
        return "python sft.py"
    run = out.with_name(f"{out.name}-judge-sft")
    return (f"python sft.py --model {out / 'judge'} --data {out / 'traces.jsonl'} "
            f"--eval-data {out / 'pairs_test.jsonl'} --out {run}")


def report(args):
    for name in ("traces.jsonl", "pairs.jsonl", "pairs_test.jsonl", "images.jsonl", "prompts.txt",
                 "prompts_test.txt"):
        with open(Path(args.out, name)) as file:
            num_lines = sum(1 for _ in file)
        print(f"  {name:17s} {num_lines:6d} {'prompts' if name.endswith('txt') else 'records'}")
    print("  judge/            untrained, to start sft.py from")
    print("  generator/        untrained, to start sft.py --task generator from")
    print(f"Next: {next_command(args)}")


def main(argv=None):
    args = parse_args(argv)
    start = time.time()
    out = Path(args.out)
    options = {name: value for name, value in vars(args).items() if name != "out"}
    recipe = out / "toy.json"
    if recipe.exists() and json.loads(recipe.read_text()) == options:
        print(f"{out} is already there, made with the same options; "
              f"delete it to have it written anew (rm -r {out})")
        report(args)
        return
    if out.exists():
        raise SystemExit(f"toy.py: {out} exists and was not made with these options. "
                         "Delete it, or pass another folder as --out.")
    print(f"writing {out} ...", flush=True)
    folder = out.with_name(f"{out.name}.partial")    # renamed when complete
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_all(folder, args)
    (folder / "toy.json").write_text(json.dumps(options, indent=1))
    folder.rename(out)
    print(f"{out}, written in {time.time() - start:.0f} s:")
    report(args)


if __name__ == "__main__":
    main()
