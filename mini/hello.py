"""Draw README's first picture: a scene, the tokens that FastV and Libra-Merging choose at their first
compression, and the answers.

python -m mini.hello --output docs/images/hello.png
"""

from pathlib import Path

from libra.utils.cli import Parser

KIND, NUMBER = "caption", 3  # the scene; chosen because it is bright and the answers differ
SHOWN = (("mini/vanilla", "the plain model"), ("mini/fastv", "FastV"), ("mini/r50", "Libra-Merging"))
SIDE = 16  # patches in a row of the picture
GOOD, BAD = "#1b7837", "#b2182b"


def seen(model, processor, sample, row: str):
    """(the answer, the targets of each compression as numbers of visual tokens, the share of FLOPs)."""
    import libra
    from libra.mini.huggingface import question

    inputs = question(processor, sample.image, sample.question)
    with libra.attach(model, row, trace=True) as handle:
        said = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if not handle.compression.compresses:
        return answer, [list(range(SIDE * SIDE))], 1.0
    trace = handle.trace[0]
    return answer, [trace.kept(stage) for stage in range(len(trace.stages))], handle.stats["flops_ratio"][0]


def shaded(image, left: list[int]):
    """(96, 96, 3): the picture, with the patches dark whose tokens are gone."""
    import numpy as np

    pixels = np.asarray(image).astype(float)
    keep = np.zeros(SIDE * SIDE, dtype=bool)
    keep[left] = True
    patch = pixels.shape[0] // SIDE
    mask = keep.reshape(SIDE, SIDE).repeat(patch, 0).repeat(patch, 1)[..., None]
    return np.where(mask, pixels, 0.12 * pixels).astype("uint8")


def draw(path: Path) -> None:
    from libra.mini.benchmark import scene_sample
    from libra.mini.huggingface import load
    from libra.utils.plotting import new_figure, save

    sample = scene_sample(KIND, NUMBER)
    model, processor = load()
    figure = new_figure(9, 4.2)
    figure.suptitle(f"“{sample.question}”", fontsize=13)
    for place, (row, name) in zip(figure.subplots(1, len(SHOWN)), SHOWN):
        answer, targets, ratio = seen(model, processor, sample, row)
        place.imshow(shaded(sample.image, targets[0]), interpolation="nearest")
        counts = " → ".join(str(len(left)) for left in targets)
        place.set_title(f"{name}\n{counts} visual tokens\n{ratio:.0%} of the FLOPs", fontsize=11)
        place.set_xlabel(answer, fontsize=12, color=GOOD if answer == str(sample.answer) else BAD)
        place.set_xticks([])
        place.set_yticks([])
    save(figure, path)


def main() -> None:
    parser = Parser(prog="python -m mini.hello", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .png or .svg")
    path = parser.parse_args().output
    try:
        draw(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
