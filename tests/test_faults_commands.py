"""Hostile configuration files and command lines: each runs or ends in one line that names the key or the
flag."""

import importlib
import itertools
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import hostile
import pytest
import torch

import libra
from libra import Compression
from libra.budget import nominal
from libra.config import ConfigError
from libra.rows import ROW_KEYS, Row


def refused(error) -> str:
    """The sentence of a caught error: one line."""
    text = str(error.value)
    assert text and text.isprintable() and "Traceback" not in text
    return text


# --- D 1, and item 6 of the list of issue 15: hostile YAML runs or ends in one line that names the key ---

KEY = "|".join(hostile.KEYS)
TOLD = re.compile(
    rf"({KEY}|compression): |is not valid YAML: .*(line \d+)?|.{{1,99}}: is not a key of |holds no keys|is "
    rf"not a plain text file|"
    r"is larger than|is nested too deeply"
)


def run_hostile(path, content: bytes) -> str:
    """What became of a file: "ran", or the sentence. Whatever it says it can do is done on a few tensors."""
    path.write_bytes(content)
    said = set()
    for read in (Compression.from_yaml, Row.from_yaml):
        try:
            compression = read(path) if read == Compression.from_yaml else read(path).compression
            compression = compression.at_depth(32, str(path))
            assert Compression.from_dict(compression.to_dict()) == compression
            if compression.compresses and read == Compression.from_yaml:
                out = libra.compress(HIDDEN, ALPHA, compression, spans=[[9, 3], [7]])
                assert out.tokens.isfinite().all() and min(nominal(compression, 32, 576)) > 0
            said.add("ran")
        except ConfigError as error:
            sentence = str(error)
            assert sentence.startswith(f"{path}: ") and sentence.isprintable() and len(sentence) < 900, (
                sentence
            )
            assert TOLD.match(sentence.removeprefix(f"{path}: ")), sentence
            said.add(sentence)
    return " | ".join(sorted(said))


HIDDEN = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
ALPHA = torch.rand(2, 12, generator=torch.Generator().manual_seed(1))


def test_d1_every_odd_value_of_every_key(tmp_path):
    """One odd value at a time, in a compression and in a row; the sentence names that key or, for bad YAML,
    the line."""
    draw = random.Random(0)
    for key in hostile.KEYS:
        for value in draw.sample(hostile.SCALARS, 6):
            others = (
                {"model": "mini", "compression": "{method: libra}"}
                if key in ROW_KEYS
                else {"method": "libra"}
            )
            text = "\n".join(f"{name}: {said}" for name, said in {**others, key: value}.items())
            sentence = run_hostile(tmp_path / "a.yaml", text.encode("utf-8", "ignore"))
            assert re.search(rf"ran|{key}|not valid YAML.*line|text file|nested", sentence), (
                key,
                value,
                sentence,
            )


def test_d1_hostile_yaml(tmp_path):
    told = [run_hostile(tmp_path / "a.yaml", hostile.text(seed)) for seed in range(300)]
    assert 10 < sum("ran" in sentence for sentence in told) < 200  # both happen


@pytest.mark.soak
def test_d1_ten_thousand_hostile_files(tmp_path):
    for seed in range(10_000):
        run_hostile(tmp_path / "a.yaml", hostile.text(seed))


def test_d1_numbers_names_and_seeds(tmp_path):
    """Those that users met, each with its key and its mend."""
    path = tmp_path / "row.yaml"
    for text, words in (
        (
            "method: libra\nratio: " + "9" * 310,
            "ratio: a whole number of 1030 bits is out of range; write a number in",
        ),
        ("method: libra\ntau: -" + "9" * 310, "tau: a whole number of 1030 bits is out of range"),
        (
            "method: libra\nlayers: [" + "9" * 310 + "]",
            "layers: a whole number of 1030 bits is out of range: the model has",
        ),
        (
            "method: libra\nlayers: !!map [a]",
            "layers: the tag tag:yaml.org,2002:map is not taken here; .* .line 2.",
        ),
        ("method: libra\nratio: !!int ''", "ratio: '' is not a number that can be read .line 2."),
        ("method: libra\nratio: " + "9" * 5000, "ratio: 9{80}… is not a number that can be read"),
        (
            f"method: random\nseed: {2**64}",
            "seed: 18446744073709551616 is not a whole number from 0 to 2.64 - 1",
        ),
        (
            "method: libra\neta: 1e-300",
            "eta: 1e-300 is not a number; .* without quotes, such as 0.001 or 1.0e-3",
        ),
        ("method: libra\neta: 1.0e-300", "eta: 1e-300 is out of range; .* 1e-30 to 1e30"),
        ("method: turbo\ninformation_weight: 1.0e+300", "information_weight: 1e.300 is out of range"),
        ("a: &a [x]\nmethod: *a", "the alias .a is not taken; write the value out .line 2."),
        (
            "b: &b {ratio: 0.5}\n<<: {ratio: 0.5}",
            "the merge key << is not taken; write the keys out .line 2.",
        ),
        ("method: " + "[" * 50, "more than 20 lists and mappings within each other"),
        (
            'model: mini\ncompression: {method: libra}\nname: "a\\nb"',
            r"name: 'a\\nb' is not a name; write a text of one line",
        ),
        ('model: "x\\ny"\ncompression: {method: libra}', r"model: 'x\\ny' is not a name"),
        ('"me\\nthod": libra', r"'me\\nthod': is not a key of compression; did you mean method\?"),
        ("method: libra\n# " + "x" * 70_000, "is larger than 64 KB"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words) as error:
            Compression.from_yaml(path).at_depth(12, str(path))
        assert refused(error).startswith(f"{path}: ")
    for seed in (2**40, 2**63 - 1, 2**63, 2**64 - 1):
        path.write_text(f"{{method: random, seed: {seed}}}")
        c = Compression.from_yaml(path)
        once, again = (libra.compress(HIDDEN, ALPHA, c).targets for _ in range(2))
        assert torch.equal(once, again)


def test_d1_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path / "pipe",
        Path("/dev/zero"),
        tmp_path,
        tmp_path / ("x" * 5000),
        Path("a\0b"),
        tmp_path / "no\nfile",
    ):
        with pytest.raises(ConfigError, match="cannot be read|there is no such file") as error:
            Row.from_yaml(path)
        refused(error)


# --- D 8: the harness takes a compression's keys only ---


def test_d8_the_harness_takes_a_compressions_keys_only(tmp_path):
    """With a checkpoint, whose own template and depth are taken; without one it says what is missing."""
    from libra.identity import row_identity
    from libra.lmms.lmms_libra import LibraModel

    path = tmp_path / "mine.yaml"
    path.write_text("{method: libra, ratio: 2/3}")
    model = LibraModel(str(path), pretrained="mini/checkpoint", device="cpu")
    assert model.engine.model.compression == Compression(method="libra", layers=(2, 5, 8), ratio="2/3")
    assert row_identity(Row.from_yaml(path, needs_model=False))["compression"]["ratio"] == 2 / 3
    with pytest.raises(
        ValueError, match=r"mine.yaml: it names no model; add `model:` to it, or .* pretrained="
    ) as error:
        LibraModel(str(path), device="cpu")
    refused(error)
    with pytest.raises(ConfigError, match="method: is a key of the compression"):
        Row.from_yaml(path)


# --- command lines: numbers and files that nobody means ---

NUMBERS = ("nan", "-1", "9" * 30, "9" * 5000, "1e5", "²", "٣", "", " ", "inf", "0x10", "a\nb", "1" * 11)
COMMANDS = {
    "libra.flops": (["--config=mini/r50"], ["--visual-tokens"], ["--config"]),
    "libra.latency": (
        ["--config=mini/r50", "--random-weights"],
        [
            "--layers",
            "--compression-layers",
            "--visual-tokens",
            "--text-tokens",
            "--batch",
            "--images",
            "--pairs",
            "--decode",
            "--threads",
        ],
        ["--config"],
    ),
    "libra.figures": (
        ["--output=a.png", "--model=none", "--image=none", "--prompt=x", "--config=mini/r50"],
        ["--dpi"],
        ["--config"],
    ),
    "libra.latency --true-size": (
        ["--true-size"],
        ["--layers", "--pairs", "--new-tokens", "--text-tokens", "--threads"],
        ["--config"],
    ),
    "eval.run": (["--table=1", "--dry-run"], ["--limit", "--batch-size", "--processes"], []),
    "eval.throughput": ([], ["--batch-sizes", "--limit", "--repeats"], []),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_d1_command_lines(command, tmp_path, capsys, monkeypatch):
    """Exit status 2 after one line that names the flag, or the file that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\x00" * 50)
    os.mkfifo(tmp_path / "pipe")
    found = (tmp_path / name for name in ("", "none.yaml", "picture.yaml", "pipe"))
    files = (*found, "/dev/null", "/dev/zero", "a\nb", "x" * 5000)
    main = importlib.import_module(command.split()[0]).main
    base, numbers, names = COMMANDS[command]
    for flag, value in (*itertools.product(numbers, NUMBERS), *itertools.product(names, files)):
        with pytest.raises(SystemExit) as ended:
            main([*(word for word in base if not word.startswith(f"{flag}=")), f"{flag}={value}"])
        error = capsys.readouterr().err.rstrip("\n")
        assert (
            ended.value.code == 2 and error.startswith("error: ") and error.isprintable() and len(error) < 700
        ), (flag, error)
        assert flag in error or str(value)[:20].split("\n")[0] in error, (flag, value, error)


def served(name):
    from libra.serve.models import load

    load(name, None, "cpu", "auto")


def drawn(name):
    from libra.figures.prefill import load

    load(name)


def spoken(name):
    from llava.serve.speakers import load

    load(SimpleNamespace(model_path=name, model_base=None))


def harnessed(name):
    from libra.lmms.lmms_libra import LibraModel

    LibraModel(config="mini/r50", pretrained=name, device="cpu")


def owned(name):
    from eval.own import model_of

    model_of(f"mine={name}")


@pytest.fixture
def asked(monkeypatch):
    """The names that the hub is asked for, without a network."""
    names = []

    def unreachable(name, **options):
        names.append(name)
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    return names


@pytest.mark.parametrize("door", [served, drawn, spoken, harnessed, owned])
def test_a_name_that_nobody_has_is_asked_for_once(door, asked):
    """from_pretrained asks five times for each of a dozen files, which takes minutes without a network."""
    with pytest.raises(
        ValueError, match="^nosuch/model is not a folder here, and the hub does not give it: no network$"
    ):
        door("nosuch/model")
    assert asked == ["nosuch/model"]


def test_a_table_asks_once_too(asked):
    from eval.checkpoints import CheckpointError, require_checkpoint

    with pytest.raises(CheckpointError, match="^checkpoint nosuch/model is not in the local cache"):
        require_checkpoint("nosuch/model")
    assert asked == ["nosuch/model"]


def test_the_harness_without_a_row():
    from libra.lmms.lmms_libra import LibraModel

    with pytest.raises(ValueError, match="config= is missing: name a row, such as config=mini/r50"):
        LibraModel(pretrained="mini", device="cpu")


def test_attaching_to_what_is_no_model():
    for given in ("llava-hf/llava-1.5-7b-hf", None, SimpleNamespace(model=1)):
        with pytest.raises(
            ValueError, match=f"takes a loaded model of transformers, not {type(given).__name__}:"
        ):
            libra.attach(given)


def test_a_suite_that_is_misspelled(capsys):
    """A first word that is no suite is a row's name, so the sentence has both lists."""
    from eval.run import main

    with pytest.raises(SystemExit):
        main(["--table", "1", "lava7b", "--dry-run"])
    said = capsys.readouterr().err
    assert "row lava7b is unknown in suite mini of table 1; use one of vanilla, fastv" in said
    assert said.rstrip().endswith("; its other models are llava7b, llava13b, next8b")
