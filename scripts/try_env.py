"""Use the installed packages as the project does: ``python scripts/try_env.py [EXTRA …]``;
scripts/check_env.py calls it.

Prints a line before each step and "all works" at the end. A step that fails ends it with one line on stderr
that names the package at fault, exit status 1.
"""

import importlib
import sys
from importlib import metadata
from pathlib import Path

from check_env import ROOT, required

MODULES = {  # where the module is not named as the distribution, or more than the top module is needed
    "filelock": "filelock._api",
    "flash-attn": "flash_attn",
    "lmms-eval": "lmms_eval.evaluator",
    "pillow": "PIL.Image",
    "playwright": "playwright.sync_api",
    "protobuf": "google.protobuf.message",
    "pytest-xdist": "xdist",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn.datasets",
}


def import_all(extras: list[str]) -> None:
    """The extras' packages first: they are smaller, and fail more often, than torch."""
    requirements = required(extras)
    core = len(required([]))
    for requirement in requirements[core:] + requirements[:core]:
        print(f"import of {requirement.name} {metadata.version(requirement.name)}", flush=True)
        importlib.import_module(MODULES.get(requirement.name, requirement.name.replace("-", "_")))


def generate() -> None:
    """A few tokens from a tiny random LLaVA of transformers, with a cache and compressed visual tokens."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    import libra

    text = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=tower, image_token_index=63)
    ).eval()
    ids = torch.tensor([[1, *[63] * 16, 5, 6]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(1, 3, 32, 32),
    }
    with libra.attach(model, libra.Compression(method="libra", layers=(0,), ratio=0.5)) as handle:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    if not handle.stats["flops_ratio"][0] < 1:
        raise RuntimeError("the visual tokens were not compressed")


def evaluate() -> None:
    """One question to the embedded model through lmms-eval."""
    from datasets import Dataset, Features, Image, Value
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from PIL.Image import new

    from libra.lmms.lmms_libra import LibraModel

    question = {
        "question": "what digit is at the top left ?",
        "answer": "3",
        "image": new("RGB", (96, 96), "white"),
    }
    features = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})
    Dataset.from_list([question], features=features).to_parquet("one.parquet")
    data = {"data_files": {"test": str(Path("one.parquet").resolve())}}
    tasks = TaskManager(
        verbosity="ERROR", include_path=str(ROOT / "libra/lmms/tasks"), include_defaults=False
    )
    model = LibraModel(
        str(ROOT / "configs/mini/r50.yaml"), str(ROOT / "mini/checkpoint"), device="cpu", batch_size=1
    )
    simple_evaluate(
        model=model,
        tasks=[{"task": "mini_reading", "dataset_kwargs": data}],
        task_manager=tasks,
        limit=1,
        bootstrap_iters=0,
        verbosity="ERROR",
    )


def at_fault(error: BaseException) -> str:
    """The error in one line. Of a failed import also the package whose module it is: where it lies if not in
    this environment, otherwise its version."""
    lines = str(error).strip().splitlines() or ["no message"]
    what = f"{type(error).__name__}: {lines[0]}"
    while not isinstance(error, ImportError):
        error = error.__cause__ or error.__context__
        if error is None:
            return what
    name = (error.name or "").split(".")[0]
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is not None and not Path(file).is_relative_to(sys.prefix):
        return f"{what}; {name} comes from {Path(file).parent}"
    for owner in metadata.packages_distributions().get(name, []):
        what += f"; {owner} {metadata.version(owner)} is installed"
        asked = {one.name: one.specifier for one in required(["test"])}.get(owner)
        return f"{what}, and setup.py asks for {owner}{asked}" if asked else what
    return what


def main(extras: list[str]) -> None:
    try:
        import_all(extras)
        print("a generation with compressed visual tokens", flush=True)
        generate()
        if {"eval", "test"} & set(extras):
            print("an evaluation with lmms-eval", flush=True)
            evaluate()
    except (Exception, SystemExit) as error:
        sys.exit("\n" + at_fault(error))
    print("all works", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
