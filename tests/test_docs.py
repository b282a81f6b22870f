"""The documents name only what exists, and their runnable blocks run."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from libra import merge, select
from libra.engine.families import TESTED
from libra.methods import METHODS
from libra.rows import shipped_rows

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])
METHOD = ROOT / "docs" / "method.md"
FOLDERS = "libra|llava|eval|mini|configs|scripts|tests|docs"
WRITTEN_BY_COMMANDS = ("docs/results", "mini/run")  # may be missing in a fresh checkout
RUNNABLE = re.compile(r"<!-- runnable -->\n```python\n(.*?)```", re.DOTALL)
FUNCTION = re.compile(r"\[`((?:libra|llava|eval|mini)\.[\w.]+)`\]\(([^)]+)\)")


def page_id(page: Path) -> str:
    return page.stem


def find(dotted: str):
    """The object behind a dotted name, importing as much of it as is a module."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            # `libra.attach` and `libra.compress` are functions of the package that hide the modules of the
            # same name.
            if error.name and not dotted.startswith(error.name):
                raise
            continue
        for part in parts[end:]:
            value = (getattr if inspect.ismodule(value) else inspect.getattr_static)(value, part)
        return value
    raise AttributeError(dotted)


def source_of(value) -> Path | None:
    """The file that defines a function, class or property; None for plain values."""
    value = value.fget if isinstance(value, property) else inspect.unwrap(value) if callable(value) else value
    try:
        return Path(inspect.getsourcefile(value))
    except TypeError:
        return None


def exists(path: str) -> bool:
    if path.startswith(WRITTEN_BY_COMMANDS):
        return True
    return any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


def test_every_equation_and_section_has_a_function():
    table = METHOD.read_text(encoding="utf-8").split("## Equations and functions")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    places = " ".join(row.split("|")[1] for row in rows)
    for place in (
        "eq. 1",
        "eqs. 2–3",
        "eq. 4",
        "eq. 5",
        "eq. 6",
        "eq. 7",
        "§3.1",
        "§3.2",
        "§3.3",
        "§3.4",
        "§4.1",
        "§4.4",
    ):
        assert place in places, place
    assert all(FUNCTION.search(row) for row in rows)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_functions_exist_where_the_links_say(page):
    for dotted, link in FUNCTION.findall(page.read_text(encoding="utf-8")):
        try:
            value = find(dotted)
        except AttributeError:
            pytest.fail(f"{page.name}: there is no {dotted}")
        source = source_of(value)
        assert source in (None, (page.parent / link).resolve()), (
            f"{page.name}: {dotted} is in {source}, not in {link}"
        )


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            target = (page.parent / link).resolve()
            assert exists(str(target.relative_to(ROOT))), f"{page.name} links to {link}"
    # A path in a comment of an example that the reader is to create is no claim.
    for path in re.findall(rf"(?<![\w/.-])(?<!# )((?:{FOLDERS})/[\w*./-]*[\w*/])", text):
        assert exists(path.rstrip("/")) or path in shipped_rows(), f"{page.name} mentions {path}"
    for module in re.findall(r"python -m ([a-z][\w.]*)", text):
        assert importlib.util.find_spec(module), f"{page.name} runs {module}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_machine_paths(page):
    found = re.findall(
        r"(?:^|[\s`'\"(=])(/(?:work|root|home|tmp|Users|mnt|data)\b\S*)", page.read_text(encoding="utf-8")
    )
    assert not found, f"{page.name}: {found}"


BLOCKS = [(page, code) for page in PAGES for code in RUNNABLE.findall(page.read_text(encoding="utf-8"))]


@pytest.fixture
def registries():
    """A block may register names: they are gone after the test."""
    before = dict(select.SELECTORS), dict(merge.MERGERS)
    yield
    for registry, names in zip((select.SELECTORS, merge.MERGERS), before, strict=True):
        registry.clear()
        registry.update(names)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block[0].stem)
def test_runnable_blocks_run(block, registries):
    page, code = block
    exec(compile(code, f"{page.name} (block)", "exec"), {"__name__": "__main__"})


def test_the_recipe_is_runnable_and_registers_both():
    codes = [code for page, code in BLOCKS if page == METHOD]
    assert any("register_select" in code and "register_merge" in code for code in codes)


def test_the_table_of_baselines_has_the_papers_methods_as_they_are():
    """The others are in docs/methods.md, which is made of their files."""
    table = METHOD.read_text(encoding="utf-8").split("one grid")[1]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("| ")
    ]
    named = {row[0].strip("`"): row for row in rows}
    assert {"vanilla", "libra", "fastv", "turbo", "random", "windowed-fastv"} <= {*named}
    for name in named.keys() & METHODS.keys():
        method, row = METHODS[name], named[name]
        assert [row[1].strip("`"), row[2].strip("`")] == [
            method.keys.get("select", ""),
            method.keys.get("merge", ""),
        ], name


@pytest.fixture(scope="module")
def methods_page():
    spec = importlib.util.spec_from_file_location("methods_page", ROOT / "scripts/methods_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_methods_page_is_what_the_methods_say(methods_page):
    said = methods_page.PAGE.read_text(encoding="utf-8") == methods_page.page()
    assert said, "run python scripts/methods_page.py"


def test_the_methods_page_says_where_a_method_compresses_and_all_that_it_sets(methods_page):
    cells = methods_page.row(METHODS["pyramiddrop"]).split(" | ")
    assert cells[1] == "after layers 7, 15, 23"
    assert cells[3] == "`topk` × `drop`, `score_layer: next`, `positions: compact`, `rounding: floor`"
    assert methods_page.row(METHODS["dart"]).split(" | ")[1] == "after layer 1"


def test_every_key_of_a_compression_is_explained():
    from dataclasses import fields

    from libra import Compression

    text = METHOD.read_text(encoding="utf-8")
    assert not [field.name for field in fields(Compression) if f"`{field.name}" not in text]


def test_the_readme_counts_what_there_is(methods_page):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    compressing = [method for method in METHODS.values() if method.compresses]
    told = methods_page.counted("models", len(TESTED)), methods_page.counted("methods", len(compressing))
    assert told[0] == text, "run python scripts/models_page.py"
    assert told[1] == text, "run python scripts/methods_page.py"
    assert "<!-- models -->999<!-- /models -->" in methods_page.counted("models", 999)


def test_the_readme_shows_the_published_differences_of_the_field():
    """Each cell is the difference of the row that its heading, method and column name."""
    lines = (ROOT / "docs" / "results" / "field.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    column = cells[0].index("Δ to vanilla")
    whole = {row[0]: row[column] for row in reversed(cells) if len(row) == len(cells[0])}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- field -->\n(.*?)\n<!-- /field -->", text, re.DOTALL)[1].splitlines()[2:]
    places = {"decoder layer": "early layer", "steps": "three layers", "language": "original positions"}
    compared = 0
    for line in shown:
        name, *differences = [cell.strip() for cell in line.strip("|").split("|")]
        if name.startswith("*"):
            where = next(place for word, place in places.items() if word in name)
            continue
        assert differences == [whole[f"{name}, {where}, {cut}"] for cut in ("1/3", "2/9", "1/9")], name
        compared += 1
    assert compared == 24


def test_the_readme_shows_the_published_table():
    published = (ROOT / "docs" / "results" / "table1.md").read_text(encoding="utf-8")
    shown = re.search(
        r"<!-- table1 -->\n(.*?)\n<!-- /table1 -->",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert shown[1].startswith("|") and shown[1] in published
