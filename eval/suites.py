"""What each table consists of: its models' row files in order, its tasks, its columns. All of it is declared
here."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from libra.lmms import TASKS
from libra.rows import Row
from libra.utils.provenance import REPOSITORY
from libra.utils.sentences import did_you_mean

from .statistics import LEARNED_AT, LEARNED_AT_SMALL

CONFIGS = REPOSITORY / "configs"
BLIND = "blind"  # the row that is not a file: vanilla on grey images
BLIND_TITLE = "vanilla, grey images (blind)"
START = "start"  # the checkpoint that others were fine-tuned from
NOT_AVERAGED = {"mme"}  # the paper's Avg leaves it out

# Suite (one model's rows; their files begin with its name, the embedded model's lie in configs/mini) → title
# of the model.
SUITES = {
    "mini": "The embedded model",
    "llava7b": "LLaVA-1.5-7B",
    "llava13b": "LLaVA-1.5-13B",
    "next8b": "LLaVA-NeXT-8B",
    "videollama2": "VideoLLaMA-2 (7B)",
    "qwen2vl7b": "Qwen2-VL-7B",
}


@dataclass(frozen=True)
class Table:
    """One table.

    name: "1" … "7" or a word; title: its heading; folder: of its row files, below configs/ and below
        configs/mini/;
    suites: the models of the paper that it has; sections: heading → rows in order, rows that are named
        nowhere come last;
    blind: the embedded model is also run on grey images, and Avg takes the question types that it has learned
    (otherwise all tasks but MME); above: show each row's difference to the row above it; extras: further
    columns, `sim` (Table 4's mean s^max), `share` (of the tokens that are no targets, what went into the
    compensation token);
    timed: samples of each task that all rows answer in turns, for time and memory; note: what to know of the
    embedded model's table; trained: checkpoints that were fine-tuned from the suite's own, each of which
    answers every row, as NAME_ROW next to the first one's start_ROW;
    tasks: of the embedded model ("mini") and of the others (""), in place of those that the rows' files name;
    kinds: kind of question → the embedded model's tasks, by which the report compares families of methods;
    pairs: rows of one section cost the same, and the report counts the pairs that differ.
    """

    name: str
    title: str
    folder: str
    suites: tuple[str, ...]
    sections: dict[str, tuple[str, ...]] = field(hash=False)
    blind: bool = False
    above: bool = False
    extras: tuple[str, ...] = ()
    timed: int = 0
    note: str = ""
    trained: tuple[str, ...] = ()
    tasks: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    kinds: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    pairs: bool = False

    @property
    def stem(self) -> str:
        """Of its results folder and its files."""
        return f"table{self.name}" if len(self.name) == 1 else self.name

    @property
    def order(self) -> list[str]:
        return [row for rows in self.sections.values() for row in rows]

    def trained_for(self, row: str) -> str:
        """Which of ``trained`` answers a row; "" for the suite's own checkpoint."""
        name = row.partition("_")[0]
        return name if name in self.trained else ""

    def asked(self, suite: str, row: Row) -> Row:
        """The row with this table's tasks, and the paper's figures for them only."""
        own = self.tasks.get("mini" if suite == "mini" else "")
        if own is None:
            return row
        figures = {key: value for key, value in row.paper.items() if key in own}
        return replace(row, tasks=list(own), paper=figures)

    def plain(self, row: str) -> str:
        """The row without compression that a row is compared to."""
        return f"{row.partition('_')[0]}_vanilla" if self.trained else "vanilla"


def _arena(prefix: str, *more: str) -> tuple[str, ...]:
    names = (
        "fastv",
        "turbo",
        "windowed_fastv",
        "random_0",
        "random_1",
        "random_2",
        "average",
        "libra",
        *more,
    )
    return tuple(f"{prefix}_{name}" for name in names)


# Of the arena: where is compressed and how much goes → how its rows' names begin, and further methods there.
_PLACES = {
    "after layer 2, 50%": ("q50",),
    "after layer 2, 75%": ("q75",),
    "after layer 2, 87.5%": ("q87",),
    "after layers 2, 5, 8, 50% each": ("h50", "pyramiddrop"),
    "after layers 2, 5, 8, 75% each": ("h75",),
}
_INTERVALS = ("windowed_fastv", "libra")


def _variants(what: str, ending: str, places: tuple[str, ...], names: tuple[str, ...]) -> dict:
    """Sections of the arena's rows NAME_ENDING, one for each of some places, so that all its rows cost the
    same."""
    return {
        f"{what}, {where}": tuple(f"{place}_{name}_{ending}" for name in names)
        for where, (place, *_) in _PLACES.items()
        if place in places
    }


_ONE_LAYER = ("libra", "fastv", "turbo", "windowed_fastv", "random_layer", "dart")
_SEVERAL = (
    "pyramiddrop", "sparsevlm", "sparsevlm_v2", "sparsevlm_list", "sparsevlm_v2_list", "vscan_two",
    "libra_quarters", "pyramiddrop_quarters",
)  # fmt: skip
_EARLY = (
    "random", "pool", "downsample", "divprune", "cdpruner", "fastervlm", "vispruner", "hiprune", "holov",
    "vscan", "mmtok", "visionzip", "prumerge", "prumerge_plus", "tome", "libra_input",
)  # fmt: skip


def _field(cut: str) -> dict[str, tuple[str, ...]]:
    """Sections of one budget: after an early layer, in several steps, and before the language model with each
    kind of positions."""
    share = {"c33": "1/3", "c22": "2/9", "c11": "1/9", "c06": "1/18"}[cut]
    sections = {
        f"{share}, after one early layer": tuple(f"{cut}_{name}" for name in _ONE_LAYER),
        f"{share}, in several steps": tuple(f"{cut}_{name}" for name in _SEVERAL),
    }
    for positions in ("original", "compact"):
        names = tuple(f"{cut}_{name}_{positions}" for name in _EARLY)
        sections[f"{share}, before the language model, {positions} positions"] = names
    return sections


_FIELD = {
    "": ("vanilla", BLIND),
    **_field("c33"),
    **_field("c22"),
    **_field("c11"),
    **_field("c06"),
    "as many as each picture asks for": ("prumerge_adaptive", "prumerge_plus_adaptive"),
}
_FRAMES = ("evs", "vidcom2", "uniform_frames", "random", "pool", "divprune", "fastervlm")


def _video(cut: str) -> dict[str, tuple[str, ...]]:
    """Sections of one budget of the films."""
    share = {"c33": "1/3", "c17": "1/6", "c11": "1/9"}[cut]
    sections = {f"{share}, between decoder layers": (f"{cut}_libra", f"{cut}_fastv")}
    for positions in ("original", "compact"):
        names = tuple(f"{cut}_{name}_{positions}" for name in _FRAMES)
        sections[f"{share}, before the language model, {positions} positions"] = names
    return sections


# The embedded model's types of question by what they ask of the visual tokens.
_KINDS = {
    "reading one thing": ("mini_position", "mini_attribute", "mini_multiple_choice", "mini_easy_vqa"),
    "whole scene": ("mini_counting", "mini_extreme", "mini_yes_no"),
    "grounding": ("mini_find", "mini_relation"),
    "small text": ("mini_reading_small", "mini_caption_small"),
    "long answers": ("mini_reading", "mini_caption"),
}
_FINE = ("grounding", "small text", "long answers")

_MAIN = ("vanilla", "fastv", "turbo", "r50", "r67", "random", "windowed_fastv", BLIND)

TABLES = {
    table.name: table
    for table in (
        Table(
            "1",
            "Table 1: methods on image benchmarks",
            "",
            ("llava7b", "llava13b", "next8b"),
            {"": _MAIN},
            blind=True,
        ),
        Table(
            "2",
            "Table 2: 75% after one layer",
            "table2",
            ("videollama2",),
            {"": ("vanilla", "fastv", "turbo", "libra")},
            note="The embedded model sees single images: this is the setting of the paper's video table, "
            "75% removed after one early layer, on its question types; there are no subtitles and no "
            "durations.",
        ),
        Table(
            "3",
            "Table 3: components",
            "table3",
            ("llava7b",),
            {
                "": ("vanilla",),
                "R = 50%": ("merging_r50", "hierarchical_r50", "pti_r50", "libra_r50"),
                "R = 67%": ("hierarchical_r67", "pti_r67", "libra_r67"),
                "R = 80%": ("hierarchical_r80", "pti_r80", "libra_r80"),
            },
            above=True,
            extras=("sim", "share"),
            note="Merging is Turbo after one layer, Hierarchical is Turbo after three. PTI exchanges its "
            "targets for intervals, IGM its average for the importance-informed merging and the "
            "compensation token.",
        ),
        Table(
            "4",
            "Table 4: pruning or merging",
            "table4",
            ("llava7b",),
            {
                "": ("vanilla",),
                "early layer": ("prune_l1", "merge_l1", "igm_l1", "prune_l3", "merge_l3", "igm_l3"),
                "middle layer": ("prune_l5", "merge_l5", "igm_l5", "prune_l15", "merge_l15", "igm_l15"),
            },
            above=True,
            extras=("sim", "share"),
            note="Targets are the most important tokens (top-k) in every row, 80% are removed. Pruning "
            "asks for no similarity; its Sim is that of the rows below, for the targets are the same.",
        ),
        Table(
            "5",
            "Table 5: variants of IGM",
            "table5",
            ("llava7b",),
            {"": ("vanilla", "igm_pos", "igm_neg", "igm")},
            above=True,
            extras=("sim", "share"),
            note="Targets are the most important tokens (top-k), 80% are removed after the middle layer.",
        ),
        Table(
            "6",
            "Table 6: time and memory",
            "table6",
            ("llava7b",),
            {"": ("vanilla", "fastv_r50", "libra_r50", "fastv_r80", "libra_r80")},
            timed=20,
            note="Ratios to vanilla on the same questions, which all rows answer in turns, one question at "
            "a time.",
        ),
        Table(
            "7",
            "Table 7: hybrid attention",
            "table7",
            ("qwen2vl7b", "llava7b"),
            {"": ("vanilla", "flash", "sdpa", "fastv", "fastv_hybrid", "libra_hybrid")},
            timed=20,
            note="Ratios to vanilla on the same questions, which all rows answer in turns, one question at "
            "a time. SDPA stands where the paper has flash-attention 2, which a CPU does not have. FastV "
            "without hybrid runs eager attention, as a method that reads the whole attention map must.",
        ),
        Table(
            "arena",
            "Arena: methods at equal layers and FLOPs",
            "arena",
            (),
            {
                "": ("vanilla", BLIND),
                **{where: _arena(*names) for where, names in _PLACES.items()},
                **_variants("importance: mean", "mean", ("q75", "q87", "h50"), ("fastv", *_INTERVALS)),
                **_variants("positions: compact", "compact", ("q75", "h50"), _INTERVALS),
                "compensation: reserved": ("h50_libra_reserved", "h50_libra_mean_reserved"),
            },
            blind=True,
            extras=("sim", "share"),
            pairs=True,
            note="Within a section of one place and rate all rows compress after the same layers to the "
            "same number of tokens, so they cost the same FLOPs. Random pruning is drawn three times. A "
            "reserved compensation token is counted; with the others it depends on the picture.",
        ),
        Table(
            "field",
            "The field at equal average tokens",
            "field",
            ("llava7b", "next8b"),
            _FIELD,
            blind=True,
            kinds=_KINDS,
            note="A small model's order of methods is not the field's: this table shows what runs, at "
            "which cost, and what each choice does to this model. Shares are visual tokens of an average "
            "layer. The methods before the language model renumber positions as published; compare methods "
            "within one kind of positions. Random, pooling and image downsampling are controls. Figures of "
            "LLaVA-1.5-7B next to ours, where there are any, are those of RESTORE (ICML 2026), Table 1, "
            "whose authors ran the official codes in one environment.",
        ),
        Table(
            "fine",
            "The field on what compression is known to harm",
            "field",
            ("llava7b", "next8b"),
            _FIELD,
            blind=True,
            tasks={
                "mini": tuple(task for kind in _FINE for task in _KINDS[kind]),
                "": ("pope", "vqav2_lite", "refcoco", "docvqa", "chartqa", "ocrbench"),
            },
            kinds={kind: _KINDS[kind] for kind in _FINE},
            note="The rows of the field's table. Large models: objects that are not there, places, text in "
            "documents, charts and scenes; the embedded model: where something is, digits of half size, and "
            "answers of many words.",
        ),
        Table(
            "video",
            "Moving digits: three frames",
            "video",
            (),
            {"": ("vanilla", BLIND), **_video("c33"), **_video("c17"), **_video("c11")},
            blind=True,
            note="The embedded model was trained on single pictures and sees a film as three of them: it "
            "knows what is there, not where or in which order, so the questions ask the colour or the "
            "value of a digit that moves, of one that is in a single frame, and whether there is one. "
            "Methods for videos look at the frames together, the others before the language model at each by "
            "itself.",
        ),
        Table(
            "E",
            "Table E: training with compression",
            "tableE",
            (),
            {
                "not fine-tuned": ("start_vanilla", "start_r50"),
                "fine-tuned with all visual tokens": ("whole_vanilla", "whole_r50"),
                "fine-tuned with Libra-Merging, 50%": ("compressed_vanilla", "compressed_r50"),
            },
            note="The paper's training table is in a supplement that was not at hand. Each difference to "
            "vanilla is what compressing costs the same checkpoint.",
            trained=("whole", "compressed"),
        ),
    )
}


# The rows of a user's folder, of any model; not one of TABLES, which have rows in configs/.
OWN = Table("own", "Rows of one's own", "", (), {"": ("vanilla",)})


@dataclass(frozen=True)
class Task:
    """name: in a row's file; harness: in lmms-eval; metric: the score's key; scale: to percent; title: its
    column;
    metric and scale are "" and 0 for a task that this project does not know: its first metric is taken, as
    it is or, where the samples' are in [0, 1], in percent;
    groups: parts of the benchmark with a column of their own; group_by: the key of a sample's metric that
    names its part; learned_at: what the plain model has at least in a type that it has learned, in per cent;
    sample: which function of :mod:`eval.samples` says how right a sample is, where its metric is not a
        number; the score is then the mean of that."""

    name: str
    harness: str
    metric: str
    scale: float
    title: str
    groups: tuple[str, ...] = ()
    group_by: str = ""
    learned_at: float = LEARNED_AT
    sample: str = ""


_DURATIONS = ("short", "medium", "long")
PAPER_TASKS = {
    task.name: task
    for task in (
        Task("gqa", "gqa", "exact_match", 100, "GQA"),
        Task("scienceqa_img", "scienceqa_img", "exact_match", 100, "ScienceQA"),
        Task("mme", "mme", "mme_perception_score", 1, "MME"),
        Task("mmbench_en_static", "mmbench_en_dev_static", "gpt_eval_score", 1, "MMBench-EN"),
        Task("mmbench_cn_static", "mmbench_cn_static", "gpt_eval_score", 1, "MMBench-CN"),
        Task("textvqa_ocr", "textvqa_ocr", "exact_match", 100, "TextVQA"),
        Task("pope", "pope", "pope_f1_score", 100, "POPE"),
        Task("vqav2_lite", "vqav2_val_lite", "exact_match", 100, "VQAv2 lite"),
        Task("refcoco", "refcoco_bbox_rec_val", "refcoco_ACC@0.5", 100, "RefCOCO", sample="overlap"),
        Task("docvqa", "docvqa_val", "anls", 100, "DocVQA"),
        Task("chartqa", "chartqa", "relaxed_overall", 100, "ChartQA"),
        Task("ocrbench", "ocrbench", "ocrbench_accuracy", 100, "OCRBench", sample="given"),
        Task("textvqa", "textvqa_val", "exact_match", 100, "TextVQA without OCR tokens"),
        Task("videomme", "videomme", "videomme_perception_score", 1, "w/o subs", _DURATIONS, "duration"),
        Task(
            "videomme_w_subtitle",
            "videomme_w_subtitle",
            "videomme_perception_score",
            1,
            "w subs",
            _DURATIONS,
            "duration",
        ),
    )
}


@dataclass(frozen=True)
class Column:
    """A task's score, or with ``group`` that of a part of it. ``key`` names it among a row's figures of the
    paper."""

    task: str
    group: str
    title: str

    @property
    def key(self) -> str:
        return f"{self.task}_{self.group}" if self.group else self.task


def columns(tasks: list[str]) -> list[Column]:
    """The columns of these tasks; those with parts come part by part, as the paper's Table 2 has them."""
    groups = list(dict.fromkeys(group for task in tasks for group in get_task(task).groups))
    if not groups:
        return [Column(task, "", get_task(task).title) for task in tasks]
    return [
        Column(task, group, f"{group or 'overall'} {get_task(task).title}")
        for group in ("", *groups)
        for task in tasks
        if not group or group in get_task(task).groups
    ]


def get_table(name: str | int) -> Table:
    """The table of that name; ValueError with the known names for any other."""
    if name == OWN.name:
        return OWN
    if str(name) not in TABLES:
        raise ValueError(f"table {name} is unknown; use one of {', '.join(TABLES)}")
    return TABLES[str(name)]


def get_task(name: str) -> Task:
    """The task a row's file names; ValueError with the known names for any other."""
    if name.startswith("mini_") and (TASKS / f"{name}.yaml").is_file():
        title = name.removeprefix("mini_").replace("_", " ")
        # Of half-size digits, and of films: the model was trained on single pictures.
        harder = name.endswith("_small") or name.startswith("mini_film_")
        least = LEARNED_AT_SMALL if harder else LEARNED_AT
        return Task(name, name, "exact_match", 100, title, learned_at=least)
    if name in PAPER_TASKS:
        return PAPER_TASKS[name]
    if name in OWN_TASKS or name in harness_tasks():
        return Task(name, name, "", 0, name)
    known = [*sorted(path.stem for path in TASKS.glob("mini_*.yaml")), *PAPER_TASKS, *OWN_TASKS]
    hint = did_you_mean(name, [*known, *harness_tasks()])
    raise ValueError(
        f"task {name} is unknown;{hint} use one of {', '.join(known)}, a name of lmms-eval's, or one of your"
        " own with --include-path"
    )


OWN_TASKS: dict[str, Path] = {}  # name → folder
_NAME = re.compile(r"^task: *[\"']?([\w.-]+)[\"']? *$", re.MULTILINE)


def _named_in(folder: Path) -> Iterator[str]:
    """The tasks that the YAML files in a folder, and below it, name."""
    for path in sorted(folder.rglob("*.yaml")):
        yield from _NAME.findall(path.read_text(encoding="utf-8", errors="replace"))


@cache
def harness_tasks() -> frozenset[str]:
    """The tasks that come with lmms-eval, without importing it; none where it is not installed."""
    found = find_spec("lmms_eval")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return frozenset(name for place in places for name in _named_in(Path(place, "tasks")))


def add_tasks(folder: Path) -> None:
    """Make the lmms-eval tasks of a user's folder known in this process. Raises ValueError where it has
    none, and for a name that is taken."""
    names = list(_named_in(folder))
    if not names:
        raise ValueError(f"--include-path {folder}: no .yaml file in it has a line such as `task: my_task`")
    for name in names:
        if name in PAPER_TASKS or (TASKS / f"{name}.yaml").is_file():
            raise ValueError(f"--include-path {folder}: {name} is a task of this project; rename yours")
        OWN_TASKS[name] = folder


def from_harness(name: str) -> bool:
    """Whether lmms-eval's own task files are needed for a task."""
    return not (TASKS / f"{get_task(name).harness}.yaml").is_file() and name not in OWN_TASKS


def row_files(table: Table, suite: str) -> dict[str, Path]:
    """A table's rows of one suite by short name (``r50``), in table order; files that the table does not name
    come last."""
    if table is OWN:
        return {}
    known = ("mini", *table.suites)
    if suite not in known:
        raise ValueError(f"suite {suite} is not in table {table.name}; use one of {', '.join(known)}")
    prefix = "" if suite == "mini" else f"{suite}_"
    folder = CONFIGS / ("mini" if suite == "mini" else "") / table.folder
    files = {path.stem.removeprefix(prefix): path for path in sorted(folder.glob(f"{prefix}*.yaml"))}
    if table.trained:
        files = {f"{who}_{name}": files[name] for who in (START, *table.trained) for name in files}
    place = {name: number for number, name in enumerate(table.order)}
    return dict(sorted(files.items(), key=lambda item: (place.get(item[0], len(place)), item[0])))


def own_files(folder: Path, taken: Iterable[str]) -> dict[str, Path]:
    """The rows of a user's folder by name. Raises ValueError where it has none, or one whose name
    is ``taken``."""
    files = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if not files:
        raise ValueError(f"--configs {folder}: there is no .yaml file in it")
    if both := sorted({*files} & {*taken}):
        raise ValueError(f"--configs {folder}: the table has a row {both[0]} already; rename {both[0]}.yaml")
    return files


class SuiteRows(Mapping[str, Row]):
    """The rows of :func:`row_files` by name, with the blind run of the embedded model at its place, and
    those of the folder ``own`` at the end. A file is read when its row is first asked for, and only then."""

    def __init__(self, table: Table, suite: str, own: Path | None = None):
        self._files, self._read = row_files(table, suite), {}
        self._asked = partial(table.asked, suite)
        if own is not None:
            self._files |= own_files(own, [*self._files, BLIND])
        if table is OWN:  # rows of several models may lie there
            self._read = {path: Row.from_yaml(path) for path in self._files.values()}
            self._files = {
                name: path for name, path in self._files.items() if self._read[path].model == suite
            }
        names = (
            sorted(self._files, key=lambda name: name not in table.order)
            if table is OWN
            else list(self._files)
        )
        if suite == "mini" and table.blind and "vanilla" in names:
            place = {name: number for number, name in enumerate(table.order)}
            names = sorted([*names, BLIND], key=lambda name: place.get(name, len(place)))
        self._names = names

    def __getitem__(self, name: str) -> Row:
        if name not in self._names:
            raise KeyError(name)
        if name == BLIND:
            return replace(self["vanilla"], title=BLIND_TITLE)
        path = self._files[name]
        if path not in self._read:
            self._read[path] = self._asked(Row.from_yaml(path))
        return self._read[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def task_digest(task: Task) -> str | None:
    """sha256 of the files of this project, or of a user's folder, that say what a task asks; None for the
    harness's own, which its version names."""
    if task.name in OWN_TASKS:
        folder = OWN_TASKS[task.name]
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return hashlib.sha256(b"\n".join(path.read_bytes() for path in files)).hexdigest()
    path, said = TASKS / f"{task.harness}.yaml", []
    while path.is_file():
        said.append(path.read_bytes())
        included = re.search(rb"^include: *(\S+)", said[-1], re.MULTILINE)
        path = TASKS / (included[1].decode() if included else "nothing")
    return hashlib.sha256(b"\n".join(said)).hexdigest() if said else None


def section_of(table: Table, row: str) -> str:
    """The heading a row stands under; rows that the table does not name stand under "other rows"."""
    return next((heading for heading, rows in table.sections.items() if row in rows), "other rows")
