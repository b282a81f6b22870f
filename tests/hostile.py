"""Hostile configuration files: a grammar of YAML that a reader may choke on, and random bytes. The same seed,
the same file."""

import random

KEYS = (
    "method",
    "select",
    "merge",
    "layers",
    "ratio",
    "tau",
    "eta",
    "importance",
    "score_layer",
    "positions",
    "rounding",
    "information_weight",
    "seed",
    "model",
    "compression",
    "tasks",
    "paper",
    "name",
    "title",
    "attention",
)
USUAL = {
    "method": ("libra", "fastv", "vanilla", "windowed_fastv", "pyramiddrop"),
    "select": ("topk", "random", "information"),
    "merge": ("drop", "igm", "igm-neg"),
    "layers": ("[7, 15, 23]", "[0]", "[2, 5, 8]"),
    "ratio": ("0.5", "2/3", "0", "0.999"),
    "tau": ("0.7", "1", "-1"),
    "eta": ("mean", "0.5"),
    "importance": ("last", "mean"),
    "score_layer": ("same", "next"),
    "positions": ("original", "compact"),
    "rounding": ("round", "floor"),
    "information_weight": ("1.0", "3"),
    "seed": ("0", "7"),
    "model": ("mini", "qwen2-vl-7b"),
    "compression": ("{method: libra}", "{method: vanilla}"),
    "tasks": ("[gqa]", "[]"),
    "paper": ("{flops: 1.78}", "{}"),
    "name": ("a row",),
    "title": ("a title",),
    "attention": ("sdpa", "eager"),
}
SCALARS = (
    "",
    "~",
    "null",
    "yes",
    "off",
    "=",
    "<<",
    "*a",
    "&a 1",
    "&a",
    "!!int ''",
    "!!float ''",
    "!!int x",
    "!!bool maybe",
    "!!null x",
    "!!str 7",
    "!!binary aGk=",
    "!!timestamp 2024-99-99",
    "2024-01-01",
    "2024-99-99",
    "!!python/object/apply:os.system [ls]",
    "!!python/name:os.system",
    "!!map [a]",
    "!!seq {a: b}",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "!!merge x",
    "!a b",
    "!<tag:yaml.org,2002:int> 7",
    "1:30:00",
    "1:" * 40 + "1",
    "0x" + "f" * 400,
    "0b" + "1" * 399,
    "0o7",
    "0_1",
    "1_000",
    "1e400",
    "-1e400",
    "9" * 310,
    "-" + "9" * 310,
    "9" * 399,
    "9" * 5000,
    "0x" + "f" * 5000,
    "9" * 310 + ".5",
    ".nan",
    ".inf",
    "-.inf",
    "1e-400",
    "-0.0",
    "2/0",
    "0/0",
    "1/" + "9" * 500,
    "-1",
    str(2**63),
    str(2**64 - 1),
    str(2**64),
    "1.5",
    "[]",
    "{}",
    "[1, [2]]",
    "[" * 19 + "]" * 19,
    "[" * 60 + "]" * 60,
    "[" * 3000,
    "{a: " * 60 + "1" + "}" * 60,
    "{[1]: 2}",
    "{{a: 1}: 2}",
    "{null: 1}",
    "{1: 2}",
    "[7, 7]",
    "[-1]",
    "[1.0]",
    "[true]",
    "[" + "9" * 50 + "]",
    "[" + "1, " * 300 + "]",
    "'a\\nb'",
    '"a\\nb"',
    '"\\u2028"',
    '"\\x1b[31m"',
    '"\\0"',
    '"\\ud800"',
    '"' + "x" * 3000 + '"',
    "|\n  a\n  b",
    ">\n  a",
    "'unfinished",
    '"unfinished',
    "a: b: c",
    "- a",
    "@",
    "`",
    "%TAG",
    "\ttab",
    "#",
    "!",
    "&",
    "*",
    "ünïcödé",
    "\u202eright",
    "? a",
    "{a, b}",
    "..",
    "---",
    "libra\u200b",
    "lıbra",
)
HEADS = (
    "",
    "",
    "",
    "",
    "---\n",
    "%YAML 1.1\n---\n",
    "%TAG ! tag:x,2000:\n---\n",
    "\ufeff",
    "a: &a [x]\n",
    "b: &b {x: 0}\n",
)
TAILS = (
    "",
    "",
    "",
    "",
    "\n...\n",
    "\n---\nmethod: libra\n",
    "\n<<: *b\n",
    "\n\x07",
    "\n\x00",
    "\n: : :",
    "\n}",
    "\nmethod: libra\nmethod: fastv",
)
LAUGHS = "a: &a [x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + b] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{c}: &{c} {{<<: [{', '.join(['*' + b] * 9)}]}}\n" for b, c in zip("abcdefgh", "bcdefghi")
)


def text(seed: int) -> bytes:
    """A configuration file: usual keys, some with an odd value; now and then one of a known bad kind, or raw
    bytes."""
    draw = random.Random(seed)
    kind = draw.randrange(20)
    if kind == 0:
        return draw.randbytes(draw.choice((0, 1, 7, 60, 3000)))
    if kind == 1:
        return draw.choice((LAUGHS, MERGES)).encode()
    if kind == 2:
        return bytes(
            draw.choice(b"abc:[]{}-&*!|>'\"%@`#,?\n\t \xff\x00\xc3") for _ in range(draw.randrange(80))
        )
    keys = draw.sample(KEYS, draw.randrange(1, 6))
    if draw.random() < 0.5:
        keys = [
            "method",
            *(
                key
                for key in keys
                if key not in ("method", "model", "compression", "tasks", "paper", "name", "title")
            ),
        ]
    odd = set(draw.sample(keys, min(len(keys), draw.choice((0, 1, 1, 1, 2)))))
    values = {key: draw.choice(SCALARS) if key in odd else draw.choice(USUAL[key]) for key in keys}
    if draw.random() < 0.1:
        values[draw.choice(SCALARS) or "x"] = draw.choice(SCALARS)
    if draw.random() < 0.2:
        body = "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"
    else:
        body = "\n".join(f"{key}: {value}" for key, value in values.items())
    if draw.random() < 0.2:
        body = "model: mini\ncompression:\n  " + body.replace("\n", "\n  ")
    return (draw.choice(HEADS) + body + draw.choice(TAILS)).encode("utf-8", "surrogatepass")
