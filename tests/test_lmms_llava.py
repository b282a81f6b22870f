"""lmms-eval's own, unmodified ``llava`` model on our package, against our plug-in, answer by answer."""

from pathlib import Path

import pytest

from libra.rows import Row

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = 6


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """evaluate(model) → its score and, by document, its answers to the embedded benchmark's questions about
    colours."""
    import datasets
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from libra.mini.benchmark import write_benchmark

    folder = tmp_path_factory.mktemp("harness")
    write_benchmark(folder / "benchmark", QUESTIONS)
    manager = TaskManager(
        verbosity="ERROR", include_path=str(ROOT / "libra" / "lmms" / "tasks"), include_defaults=False
    )
    files = {"data_files": {"test": str(folder / "benchmark" / "reading.parquet")}}

    def run(model):
        results = simple_evaluate(
            model=model,
            tasks=[{"task": "mini_reading", "dataset_kwargs": files}],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        answers = {
            sample["doc_id"]: sample["filtered_resps"] for sample in results["samples"]["mini_reading"]
        }
        assert len(answers) == QUESTIONS
        return results["results"]["mini_reading"]["exact_match,none"], answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield run


def stock():
    """The model that ``--model llava --model_args …`` makes."""
    from lmms_eval.models import get_model

    settings = f"pretrained={ROOT / 'mini' / 'checkpoint'},device=cpu,device_map=auto,conv_template=mini"
    model = get_model("llava").create_from_arg_string(settings, {"batch_size": 1})
    assert type(model).__module__ == "lmms_eval.models.simple.llava" and type(
        model.model
    ).__module__.startswith("llava.")
    return model


def ours(row: str):
    """Our model in the stock one's dtype: it converts the pixels to float16."""
    from libra.lmms.lmms_libra import LibraModel

    checkpoint = str(ROOT / "mini" / "checkpoint")
    return LibraModel(
        str(ROOT / "configs" / "mini" / f"{row}.yaml"),
        checkpoint,
        device="cpu",
        batch_size=1,
        dtype="float16",
    )


def test_the_stock_model_gives_the_plug_ins_answers(evaluate):
    theirs = evaluate(stock())
    assert theirs == evaluate(ours("vanilla"))
    assert theirs[0] > 0.5 and len(set(map(str, theirs[1].values()))) > QUESTIONS / 2


def test_the_stock_model_gives_the_plug_ins_answers_with_compression(evaluate):
    """Its arguments leave no place for a compression; the loaded model takes one."""
    model = stock()
    loaded = model.model  # the harness takes it off its model after each run
    loaded.set_compression(Row.from_yaml(ROOT / "configs" / "mini" / "r50.yaml").compression)
    theirs = evaluate(model)
    assert [tokens for (tokens,) in loaded.compression_stats["visual_tokens"]][::3] == [256, 128, 64, 32]
    assert theirs == evaluate(ours("r50"))
