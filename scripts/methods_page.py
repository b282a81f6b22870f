"""Write docs/methods.md, and the number of methods in README.md, from the methods' files: python
scripts/methods_page.py (a test compares them)."""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from libra.config import Compression  # noqa: E402
from libra.methods import FILES, Method, natural_layers  # noqa: E402
from libra.vllm.settings import added, reads_the_reader  # noqa: E402

PAGE, README = ROOT / "docs/methods.md", ROOT / "README.md"
DEPTH = 32  # of LLaVA-1.5-7B, for which natural places are shown
HEAD = """# The methods

Written by `python scripts/methods_page.py` from the files of [libra/methods](../libra/methods); change \
those, not this page.

A method is a way to choose target tokens (`select`), a way to treat the rest (`merge`) and a place: after \
decoder layers, at the input
of the language model, or in the vision tower before the model's own projector. `at: input`, `at: tower` or \
`layers` moves a method away
from its own place, wherever what it needs is to be had; `steps` is a list of compressions, one after \
another. The layers
are a method's own places in a decoder of 32; in another they lie at the same parts of its depth. LLaVA's door
(`llava`) runs all of them, attached models as far as their vision tower tells what is needed \
([plugin.md](plugin.md)).
`libra.compress(hidden, None, c, context=libra.Context(…))` runs any of them on tensors.

[docs/method.md](method.md) has the equations of Libra-Merging and what its paper leaves open, \
[docs/contributing.md](contributing.md)
says how a method is added, [docs/serving.md](serving.md) what "in vLLM" means.

| method | place | goes by | select × merge, other keys | needs | in vLLM | source |
|---|---|---|---|---|---|---|
"""
LEFT_OUT = """## Not here

FlashVID, for videos, is left out. Its clusters depend on random noise, so what it keeps is not a function \
of the video;
it keeps a quarter more than T before the language model and what its ceilings add, a token can come out \
twice, and what is
merged over three frames or more is not their mean. A form without noise that keeps exactly T would be a \
method of our own, and the
embedded model's films have three frames only. EVS and VidCom2 are the methods for videos here.
"""


def plain(text: str) -> str:
    """A docstring as Markdown: roles become code."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)


def in_vllm(name: str) -> str:
    """For a cell: whether vLLM can do a method, and what is to be written besides its name."""
    keys = added(name)
    if keys is None:
        return "no"
    if reads_the_reader(Compression(method=name, **keys)):
        return "Qwen2.5-VL"
    return ", ".join(f"`{key}: {value}`" for key, value in keys.items()) or "yes"


def place_of(method: Method) -> str:
    """For a cell: where a method compresses, its natural layers one by one."""
    if method.place != "layers":
        return method.place
    layers = natural_layers(method.name, DEPTH, DEPTH - 1)
    return f"after layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def parts_of(method: Method, c: Compression) -> str:
    """For a cell: a method's select and merge, and the other keys that it sets."""
    others = (f"`{key}: {value}`" for key, value in method.keys.items() if key not in ("select", "merge"))
    return ", ".join((f"`{c.select}` × `{c.merge}`", *others))


def row(method: Method) -> str:
    needs, parts, place = "", "", ""
    if method.compresses:
        c = Compression(method=method.name)
        needs = ", ".join(f"`{need}`".replace("|", "` or `") for need in c.needs) or "nothing"
        needs = "attention of the decoder" if not c.needs and c.reads_importance else needs
        parts, place = parts_of(method, c), place_of(method)
    name = f"[`{method.name}`](#{method.name})"
    cells = (name, place, method.family, parts, needs, in_vllm(method.name), method.section)
    return f"| {' | '.join(cells)} |"


def section(file) -> str:
    method = file.METHOD
    title, _, text = file.__doc__.strip().partition("\n\n")
    lines = [f"## {method.name}", "", plain(" ".join(title.split()))]
    if text:
        lines += ["", *(plain(" ".join(part.split())) + "\n" for part in text.split("\n\n"))]
        lines[-1] = lines[-1].rstrip()
    if method.cost:
        lines += ["", f"Cost: {method.cost}."]
    if method.deviation:
        lines += ["", f"Ours differs: {method.deviation}."]
    return "\n".join(lines)


def page() -> str:
    rows = "\n".join(row(file.METHOD) for file in FILES)
    return f"{HEAD}{rows}\n\n" + "\n\n".join([*map(section, FILES), LEFT_OUT])


def counted(what: str, number: int) -> str:
    """README.md with the ``number`` of "methods" or of "models" that there is."""
    text = README.read_text(encoding="utf-8")
    return re.sub(rf"(<!-- {what} -->)\d+(<!-- /{what} -->)", rf"\g<1>{number}\2", text)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition(":")[0] + ".").parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    number = sum(file.METHOD.compresses for file in FILES)
    README.write_text(counted("methods", number), encoding="utf-8")
