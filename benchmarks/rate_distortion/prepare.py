"""The vocabulary, the teacher and the students of `benchmarks.rate_distortion`, made once and kept in a folder.

    python -m benchmarks.rate_distortion.prepare --run RUN [--text FILE_OR_FOLDER ...]

The text is the sources of Python's own standard library, with `--text` beside it; nothing is downloaded. What is in the
folder already is not made again.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.rate_distortion.text import prepare_text, standard_library
from benchmarks.rate_distortion.training import Recipe, load_or_train

TEACHER = Recipe("teacher", layers=2, width=128, sampled_steps=1000, whole_steps=10, batch=32, rate=4e-3)
STUDENTS = {
    "early": Recipe("early", layers=2, width=64, sampled_steps=0, whole_steps=30, seed=1),
    "late": Recipe("late", layers=2, width=64, sampled_steps=1000, whole_steps=20, seed=1),
}
AGES = (0, 100, 300)  # steps of further students, for what depends on how early one is
OTHERS = {
    f"{steps} steps": Recipe(f"after-{steps}", 2, 64, sampled_steps=steps, whole_steps=0, seed=1) for steps in AGES
}


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder that everything goes to")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files and folders of text, UTF-8")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    prepare_text([*options.text, standard_library()], options.run)
    for recipe in (TEACHER, *STUDENTS.values(), *OTHERS.values()):
        load_or_train(recipe, options.run)


if __name__ == "__main__":
    main()
