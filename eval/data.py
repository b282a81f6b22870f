"""The paper's data sets onto this machine, with licence and size told beforehand: python -m eval.data --table
1"""

import os
import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatch

from libra.lmms import TASKS
from libra.utils.cli import Parser, names

from .formats import text_table
from .suites import PAPER_TASKS, TABLES, SuiteRows, Task, get_table, get_task

EXAMPLES = """examples:
  python -m eval.data --table 1            what Table 1 reads: data sets, licences, sizes; downloads nothing
  python -m eval.data --table 1 --yes      download it
  python -m eval.data --tasks gqa,mme --yes"""
ASK = "see the data set's page"


@dataclass(frozen=True)
class DataSet:
    """name: on the hub; folders: of its files, those that our tasks read (all where empty); licence: as its
    makers put it."""

    name: str
    folders: tuple[str, ...] = ()
    licence: str = ASK

    @property
    def page(self) -> str:
        return f"https://huggingface.co/datasets/{self.name}"


_MMBENCH = "lmms-lab-encoder/MMBench"
DATA = {  # task of a row's file → what it reads
    "gqa": DataSet("lmms-lab-encoder/GQA", ("testdev_balanced_instructions", "testdev_balanced_images")),
    "scienceqa_img": DataSet("lmms-lab-encoder/ScienceQA", ("ScienceQA-IMG",), "CC BY-NC-SA 4.0"),
    "mme": DataSet("lmms-lab-encoder/MME"),
    "mmbench_en_static": DataSet(_MMBENCH, ("en",)),
    "mmbench_cn_static": DataSet(_MMBENCH, ("cn",)),
    "pope": DataSet("lmms-lab-encoder/POPE"),
    "vqav2_lite": DataSet("lmms-lab-encoder/LMMs-Eval-Lite", ("vqav2_val",)),
    "refcoco": DataSet("lmms-lab-encoder/RefCOCO"),
    "docvqa": DataSet("lmms-lab-encoder/DocVQA", ("DocVQA",)),
    "chartqa": DataSet("lmms-lab-encoder/ChartQA"),
    "ocrbench": DataSet("echo840/OCRBench"),
    "textvqa_ocr": DataSet("lmms-lab-encoder/textvqa", (), "CC BY 4.0"),
    "textvqa": DataSet("lmms-lab-encoder/textvqa", (), "CC BY 4.0"),
    "videomme": DataSet("lmms-eval/Video-MME", (), "academic research only, no commercial use"),
    "videomme_w_subtitle": DataSet("lmms-eval/Video-MME", (), "academic research only, no commercial use"),
}


def tasks_of(tables: list[str]) -> list[str]:
    """The paper's tasks that the rows of these tables name, in the order of their columns."""
    named = set()
    for name in tables:
        table = get_table(name)
        for suite in table.suites:
            for row in SuiteRows(table, suite).values():
                named.update(row.tasks)
    return [task for task in PAPER_TASKS if task in named]


def size(files: list[tuple[str, int | None]], folders: tuple[str, ...]) -> int | None:
    """Bytes of the files (name and size) in these folders; of all files where none lies in them. None where
    one is unknown."""
    chosen = [count for name, count in files if any(fnmatch(name, f"{folder}/*") for folder in folders)]
    chosen = chosen or [count for _, count in files]
    return None if not chosen or None in chosen else sum(chosen)


def inspect(data: DataSet) -> tuple[str, str]:
    """(licence, size) for the listing, of what the hub tells; ConnectionError where it does not answer."""
    from huggingface_hub import HfApi

    try:
        told = HfApi().dataset_info(data.name, files_metadata=True, timeout=10)
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise ConnectionError(type(error).__name__) from error
    count = size([(file.rfilename, file.size) for file in told.siblings or []], data.folders)
    own = (told.card_data or {}).get("license") if data.licence == ASK else None
    licence = f"{own} (its card says)" if own else data.licence
    return licence, ASK if count is None else f"{count / 1e9:.2f} GB"


def listing(tasks: list[str]) -> tuple[list[str], str]:
    """A line for each data set, and why sizes are missing ("" where they are not)."""
    readers: dict[DataSet, list[str]] = {}
    for name in tasks:
        readers.setdefault(DATA[name], []).append(name)
    lines, offline = [], ""
    for data, asking in readers.items():
        licence, count = data.licence, "not known offline"
        if not offline:  # asking once more would only take time
            try:
                licence, count = inspect(data)
            except ConnectionError as error:
                offline = str(error)
        lines.append([data.page, ", ".join(asking), ", ".join(data.folders) or "all of it", count, licence])
    return text_table(["data set", "for", "files", "size", "licence"], lines), offline


def fetch(task: Task) -> None:
    """Have the harness load a task, which downloads what it reads and lays it where a run looks for it."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(verbosity="ERROR", include_path=str(TASKS))
    get_task_dict([task.harness], manager, "simple")


def cause(error: BaseException) -> str:
    """One line on what went wrong, from under the harness's retries."""
    from tenacity import RetryError

    if isinstance(error, RetryError) and error.last_attempt.failed:
        error = error.last_attempt.exception()
    lines = str(error).strip().splitlines() or ["no message"]
    return re.sub(r" object at 0x[0-9a-f]+", "", f"{type(error).__name__}: {lines[0]}")


def parser() -> Parser:
    parser = Parser(
        prog="python -m eval.data",
        description="List the paper's data sets, and download them.",
        epilog=EXAMPLES,
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument(
        "--table", choices=[name for name, table in TABLES.items() if table.suites], help="all that it reads"
    )
    chosen.add_argument("--tasks", type=names, metavar="A,B", help="only these, such as gqa,mme")
    parser.add_argument("--yes", action="store_true", help="download, with these licences and sizes accepted")
    return parser


def main(argv: list[str] | None = None) -> int:
    """0 when all is listed, or downloaded; 2 after one `error: …` line."""
    options = parser()
    args = options.parse_args(argv)
    try:
        tasks = tasks_of([args.table]) if args.table else args.tasks
        unknown = next((name for name in tasks if name not in DATA), None)
        if unknown is not None:
            raise ValueError(f"task {unknown} reads no data set of the hub; use one of {', '.join(DATA)}")
        lines, offline = listing(tasks)
    except ValueError as error:
        options.error(str(error))
    print("\n".join(lines))
    if offline:
        options.error(
            f"the model hub does not answer ({offline}): connect to the internet, then run the same command"
            " again"
        )
    if not args.yes:
        print("\nnothing was downloaded; add --yes to download")
        return 0
    for name in tasks:
        print(f"downloading what {name} reads …", file=sys.stderr)
        try:
            fetch(get_task(name))
        except (Exception, SystemExit) as error:
            options.error(f"{name}: {cause(error)}; run the same command again to go on")
    where = os.environ.get("HF_HOME", os.path.join("~", ".cache", "huggingface"))
    print(f"{len(tasks)} tasks are ready, below {where}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
