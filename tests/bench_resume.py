"""20 times kill -9 at random moments, then --resume, on 1 and on 2 processes: is the end bit-identical to a run left alone?

    python tests/bench_resume.py        about 15 minutes on 2 cores
"""
import sys
import tempfile
from pathlib import Path

import conftest  # paths
import toy
import toy_models
from test_resume import kill_and_resume, same, state_of
from test_sft import small


def main(kills=20):
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            model, processor = toy_models.make_judge(0, width=32, layers=2, vision_width=24, vision_layers=2)
            model.save_pretrained(f"{folder}/judge")
            model.generation_config.max_new_tokens = 8
            model.generation_config.save_pretrained(f"{folder}/judge")
            processor.save_pretrained(f"{folder}/judge")
            Path(folder, "judge", "template.txt").write_text(toy_models.INSTRUCTION)
            toy.main(["--out", f"{folder}/toy", "--num-traces", "64", "--num-pairs", "8", "--num-images", "8", "--num-prompts", "8",
                      "--num-eval-pairs", "4", "--num-eval-prompts", "4"])
            command = ["sft.py", *small(f"{folder}/toy"), "--model", f"{folder}/judge", "--max-steps", "600", "--save-every", "1", "--batch-size", "2"]
            moments = kill_and_resume(command, folder, kills, ranks)
            equal = same(state_of(f"{folder}/whole"), state_of(f"{folder}/killed"))
            print(f"{ranks} processes: killed after steps {[step for step, _ in moments]}, {sum(saving for _, saving in moments)} of them in a save; "
                  f"weights, optimizer and log rows {'identical' if equal else 'DIFFER'}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
