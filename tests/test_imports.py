"""The rooms and their levels: every file imports only from its own room and from rooms below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("libra", "llava", "eval", "mini")
# Lowest first; a room imports from its own level and from those below. A name covers all that begins with it;
# the longest that does decides. `libra` itself is the face: it hands out names of the engine and below.
LEVELS = (
    ("libra.ops",),
    ("libra.methods",),
    (
        *(
            "libra.config",
            "libra.budget",
            "libra.flops",
            "libra.select",
            "libra.merge",
            "libra.step",
            "libra.places",
        ),
        *("libra.rows", "libra.identity", "libra.checkpoints", "libra.media", "libra.utils"),
    ),
    ("libra.engine", "libra"),
    ("llava",),
    (
        *("libra.lmms", "libra.figures", "libra.latency", "libra.serve", "libra.vllm"),
        "libra.mini",
    ),
    ("eval",),
    ("mini",),
)
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
ANYWHERE = {"libra.utils"}  # a toolbox without a level: it imports nothing of the project but itself


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(path: Path, at_once: bool = False) -> Iterator[tuple[str, str | None]]:
    """What a file imports, as (module, name in it or None): wherever in the file, also for type checkers, or
    only ``at_once``, when it is imported itself."""
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_bytes())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def imported(path: Path, at_once: bool = False) -> Iterator[str]:
    """The project's modules among a file's imports."""
    for module, name in imports(path, at_once):
        if module.partition(".")[0] in PACKAGES:
            yield f"{module}.{name}" if f"{module}.{name}" in FILES else module


def room_of(name: str) -> str:
    """The room of a module; AssertionError for one that no level has."""
    parts = name.split(".")
    inside = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    room = next((room for room in inside if room in LEVEL), None)
    assert room is not None and (room != "libra" or name == "libra"), (
        f"{name} is in no room: add it to LEVELS"
    )
    return room


BETWEEN = [
    (name, other)
    for name, path in FILES.items()
    for other in sorted(set(imported(path)))
    if name != "libra" and room_of(name) != room_of(other)
]


def test_nothing_is_imported_from_a_room_above():
    upward = [
        f"{name} imports {other}"
        for name, other in BETWEEN
        if LEVEL[room_of(other)] > LEVEL[room_of(name)] and room_of(other) not in ANYWHERE
    ]
    assert not upward


def test_the_toolbox_imports_nothing_of_the_project():
    assert not [pair for pair in BETWEEN if room_of(pair[0]) in ANYWHERE]


def test_no_two_rooms_import_each_other_round_about():
    """Between rooms of one level, which the levels leave open. A function's own imports do not count: a
    compression reads the rows that are made of compressions."""
    reached: dict[str, set[str]] = {room: set() for room in LEVEL}
    for name, path in FILES.items():
        reached[room_of(name)] |= {room_of(other) for other in imported(path, at_once=True)} - {room_of(name)}
    for _ in LEVEL:
        for room in LEVEL:
            reached[room] = reached[room].union(*(reached[other] for other in reached[room]))
    assert not [room for room in LEVEL if room in reached[room]]


def names_in(path: Path) -> set[str]:
    """All names that a module binds at its top level, also under an if or a try."""
    found, left = set(), list(ast.parse(path.read_bytes()).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        else:
            left += ast.iter_child_nodes(node)
    return found


def test_what_a_file_takes_from_another_is_there():
    """Also what functions, scripts and tests take, which nobody runs until they are needed."""
    bound = {name: names_in(path) for name, path in FILES.items()}
    outside = (path for room in ("scripts", "tests") for path in sorted((ROOT / room).rglob("*.py")))
    assert not [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path in (*FILES.values(), *outside)
        for module, name in imports(path)
        if name and module in FILES and f"{module}.{name}" not in FILES
        if name not in bound[module] and "__getattr__" not in bound[module]
    ]


def test_the_face_imports_no_door_when_it_is_imported():
    """A name's module comes when the name is first used; no door among them."""
    import libra

    modules = {f"libra.{module}" for module in libra._MODULES.values()}
    assert all(LEVEL[room_of(module)] <= LEVEL["libra.engine"] for module in modules)
    assert {room_of(other) for other in imported(FILES["libra"])} <= {
        *(room for level in LEVELS[: LEVEL["libra.engine"] + 1] for room in level)
    }
