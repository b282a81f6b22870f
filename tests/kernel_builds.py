"""Compile every Triton kernel as the models of this repository launch it, for GPUs that need not be there.

``python tests/kernel_builds.py 80 90`` prints a JSON line for each build: kernel, compute capability, what
differs between its builds, shared memory in bytes, registers of a thread and spilled bytes; with ``--one``
for one build of each kernel. It has to run without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from libra.budget import keeps  # noqa: E402
from libra.config import Compression  # noqa: E402
from libra.ops import kernels  # noqa: E402
from libra.ops.spans import Spans  # noqa: E402

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def described(kernel, args, kwargs) -> tuple[dict, dict, set, dict]:
    """Of one launch, as Triton itself takes it: the signature, what is compiled in, the aligned arguments and
    the options."""
    given = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    signature, constants, aligned = {}, {}, set()
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or type(value) is int and value == 1 and not parameter.do_not_specialize:
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            aligned.add(place)  # torch aligns its allocations
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.add(place)
    return signature, constants, aligned, {k: kwargs[k] for k in OPTIONS if k in kwargs}


def source(kernel, signature, constants, aligned):
    """Triton's AST source, whose parts are said in one way since 3.3 and in another before."""
    try:
        from triton.backends.compiler import AttrsDescriptor
    except ImportError:
        attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
        signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    else:
        attributes = AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
    return triton.compiler.ASTSource(kernel, signature, constants, attributes)


def usage(built) -> tuple[int, int]:
    """Registers of a thread and the bytes of its stack, where registers spill to, by the tool that comes with
    Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", cubin.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", said)[1]), int(re.search(r"STACK:(\d+)", said)[1])


def launches(dtype: torch.dtype) -> None:
    """Call the functions of the kernels at the sizes of the models; on the meta device nothing is
    computed."""
    empty = partial(torch.empty, device="meta")
    numbers = partial(empty, dtype=torch.long)
    for width, heads, kv_heads in ((128, 32, 32), (128, 28, 4), (80, 20, 20), (64, 14, 2), (256, 16, 8)):
        query, key, rows = (
            empty(2, heads, 640, width, dtype=dtype),
            empty(2, kv_heads, 700, width, dtype=dtype),
            numbers(2, 1),
        )
        kernels.score_row(query, key, rows, 0.1)
        kernels.score_row(query, key, range(639, 640), 0.1)
        kernels.score_row(query, key, rows, 0.1, empty(2, 700, dtype=torch.bool), 512)
    for batch, count, width in (
        (1, 288, 4096),
        (8, 288, 4096),
        (1, 1440, 3584),
        (4, 8192, 5120),
        (1, 7, 896),
    ):
        tokens = empty(batch, count, width, dtype=dtype)
        groups = numbers(batch, count), numbers(batch, count)
        kernels.most_similar(tokens, tokens)
        kernels.most_similar(tokens, tokens, groups, itself=False)
        kernels.merge_groups(tokens, groups[0], empty(batch, count), count // 2)
    for tokens in (16, 576, 1024, 2880, 8192):
        similarity = empty(2, tokens, tokens)
        kernels.pick_farthest(similarity, empty(2, tokens), 12)
        kernels.greedy_map(similarity, 12)
    for length in (40, 576, 2880, 16384):
        kernels.group_softmax(empty(2, length), numbers(2, length), length // 2)
        kernels.ordinals(empty(2, length, dtype=torch.bool), length // 2)
        for spans in ([[length]] * 2, [[length // 4, length // 2], [length]]):
            layout = Spans.build(spans, keeps(spans, Compression()), "meta")
            rest = max(layout.rest_counts)
            order = numbers(2, layout.targets + rest)
            asked = empty(2, length), empty(2, 1), order, layout, (empty(2, rest), numbers(2, rest)), 0.7
            kernels.best_of_intervals(empty(2, length), layout)
            kernels.slots_and_logits(*asked)
            kernels.slots_and_logits(*asked, numbers(2, 1))


def builds(capabilities: list[int], one: bool):
    """One dict for each different build, or for the last of each kernel."""
    found = {}

    def keep(kernel, *args, grid, warmup, **kwargs):
        signature, constants, aligned, options = described(kernel, args, kwargs)
        key = kernel.__name__, "" if one else str((signature, constants, sorted(aligned), options))
        found[key] = kernel, signature, constants, aligned, options

    for kernel in vars(kernels).values():
        if isinstance(kernel, triton.JITFunction):
            kernel.run = partial(keep, kernel)
    for dtype in kernels.FLOATS:
        launches(dtype)
    for kernel, signature, constants, aligned, options in found.values():
        for capability in capabilities:
            built = triton.compile(
                source(kernel, signature, constants, aligned),
                target=GPUTarget("cuda", capability, 32),
                options=options,
            )
            registers, spilled = usage(built)
            types = sorted({kind for kind in signature.values() if kind in ("*bf16", "*fp16", "*fp32")})
            variant = " ".join([*types, *(f"{name}={value}" for name, value in constants.items())])
            yield {
                "kernel": kernel.__name__,
                "capability": capability,
                "variant": variant,
                "shared": built.metadata.shared,
                "registers": registers,
                "spilled": spilled,
            }


if __name__ == "__main__":
    for build in builds([int(text) for text in sys.argv[1:] if text != "--one"], "--one" in sys.argv):
        print(json.dumps(build), flush=True)
