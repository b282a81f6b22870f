"""How far one piece of work goes through the project: ``python tests/walk.py [NAME …]``.

Four walks: an attached generation, an answer of LLaVA's, a training step, a cell of a table. Of each is
printed which of the project's files it enters (a function of theirs is called, imports apart), how often a
function of one file calls a function of another (a border), and how many row files are parsed.
"""

import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("libra", "llava", "eval", "mini")
PARSER = "libra/utils/plain_yaml.py", "load"  # the function that reads a row's YAML


@dataclass
class Walk:
    """files: calls of functions by file; borders: calls by (from file, to file); parses: of row files."""

    files: Counter = field(default_factory=Counter)
    borders: Counter = field(default_factory=Counter)
    parses: int = 0

    def call(self, frame, event: str, _) -> None:
        """For :func:`sys.setprofile`."""
        if event != "call":
            return
        name = frame.f_code.co_name
        here = _file(frame.f_code.co_filename)
        if here is None or name == "<module>":
            return
        self.files[here] += 1
        self.parses += (here, name) == PARSER
        caller = frame.f_back and _file(frame.f_back.f_code.co_filename)
        if caller is not None and caller != here:
            self.borders[caller, here] += 1

    def __str__(self) -> str:
        lines = [f"{len(self.files)} files, {self.borders.total()} borders, {self.parses} row files parsed"]
        lines += [f"  {count:6} {name}" for name, count in self.files.most_common()]
        lines += [f"  {count:6} {one} → {other}" for (one, other), count in self.borders.most_common(12)]
        return "\n".join(lines)


_FILES: dict[str, str | None] = {}  # of a code object's file name, the project's file


def _file(name: str) -> str | None:
    if name not in _FILES:
        path = Path(name)
        inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES
        _FILES[name] = path.relative_to(ROOT).as_posix() if inside else None
    return _FILES[name]


@contextmanager
def walked():
    """Follows what is called in the block, in threads that start in it too."""
    walk = Walk()
    threading.setprofile(walk.call)
    sys.setprofile(walk.call)
    try:
        yield walk
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def attached_generation() -> Walk:
    """Attach to a tiny Hugging Face LLaVA of twelve layers, three of which are followed by a compression,
    generate eight tokens, detach."""
    import families

    import libra

    name = "LlavaForConditionalGeneration"
    model = families.own_model(name, num_hidden_layers=12)
    given = families.collate(name, [families.talk(name, "t4 i t5", seed=0)])

    def generate(tokens: int) -> None:
        with libra.attach(model, libra.Compression(layers=[2, 5, 8], ratio=0.5)):
            model.generate(**given, max_new_tokens=tokens, do_sample=False)

    generate(1)  # what is imported and cached once
    with walked() as walk:
        generate(8)
    return walk


def _embedded():
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(ROOT / "mini" / "checkpoint"), None, "mini", device="cpu")


def llava_answer() -> Walk:
    """The embedded model answers a question about a scene, eight tokens."""
    from PIL import Image

    from libra import Compression
    from llava.mm_utils import process_images, tokenizer_image_token

    tokenizer, model, processor, _ = _embedded()
    model.set_compression(Compression(layers=[2, 5, 8], ratio=0.5))
    image = Image.new("RGB", (96, 96), (90, 120, 90))

    def answer(tokens: int) -> None:
        prompt = "USER: <image>\nwhich digits ? ASSISTANT:"
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
        images = process_images([image], processor, model.config)
        tokens = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        model.generate(ids, images=images, image_sizes=[image.size], do_sample=False, **tokens)

    answer(1)
    with walked() as walk:
        answer(8)
    return walk


def training_step() -> Walk:
    """Two samples from their files, forward and backward of the embedded model."""
    import odd_files
    from PIL import Image

    from libra import Compression
    from llava.train.data import Collator

    loaded = tokenizer, model, _, _ = _embedded()
    model.set_compression(Compression(layers=[2, 5, 8], ratio=0.5))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.png", "b.png"):
            Image.new("RGB", (96, 96), (90, 120, 90)).save(Path(folder, name))
        data = odd_files.training_on(loaded, Path(folder), "a.png", "b.png")
        collate = Collator(tokenizer.pad_token_id, 1024, model.placeholders, None)

        def step() -> None:
            batch = collate([data[0], data[1]])
            model.train()(**batch).loss.backward()

        step()
        with walked() as walk:
            step()
    return walk


def table_cell() -> Walk:
    """Plan one cell of Table 1, answer two questions for it and put its record together, where the questions
    are written and the worker has answered another compressed row: what a first answer only imports or names
    is not on the way of a cell, whatever ran before."""
    from eval.harness import Harness, Settings
    from eval.plan import Wanted, plan
    from eval.suites import get_table

    with tempfile.TemporaryDirectory() as folder:

        def planned(row: str):
            wanted = Wanted([row], ["reading"], 2, benchmark=Path(folder, "benchmark"))
            return plan(get_table("1"), "mini", wanted).cells[0]

        harness = Harness(Settings(str(Path(folder, "results")), "cpu", 1, 2, "float32", online=False))
        harness(planned("r67"), lambda count: None)
        with walked() as walk:
            cell = planned("r50")
            cell.record(harness(cell, lambda count: None))
    return walk


WALKS: dict[str, Callable[[], Walk]] = {
    "attach": attached_generation,
    "llava": llava_answer,
    "training": training_step,
    "cell": table_cell,
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in WALKS]
    if unknown:
        print(f"error: {unknown[0]} is not a walk; use {', '.join(WALKS)}", file=sys.stderr)
        return 2
    for name in names or WALKS:
        print(f"{name}: {WALKS[name]()}\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
