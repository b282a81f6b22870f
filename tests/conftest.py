"""What every test shares: no network, one thread a process, and the options for slow tests and tests that
need a GPU."""

import os

# Before anything imports Hugging Face's packages or torch, which read these once.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small for more to pay

import pytest  # noqa: E402
import torch  # noqa: E402

from libra.utils.provenance import REPOSITORY  # noqa: E402

pytest_plugins = ["soak", "torch_flash"]  # the option --soak; flash attention in pure torch

# Before anything imports Triton: without a GPU its kernels run as Python, for tests/test_kernels.py.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# Reasons to skip a test that no package, browser or other program that could be installed would change.
NOTHING_TO_INSTALL = (
    "slow: ",
    "soak: ",
    "needs a CUDA device",
    "kernels are compiled",
    "this torch's FSDP needs GPUs",
    "newer ones take",
    "vLLM has an environment of its own",
)


def pytest_addoption(parser):
    parser.addoption(
        "--all", "--run-slow", action="store_true", dest="run_slow", help="also run the tests marked slow"
    )
    parser.addoption(
        "--complete", action="store_true", help="fail if a test is skipped for want of something to install"
    )


@pytest.fixture(scope="module")
def loaded():
    """The embedded model: tokenizer, model, processor, length."""
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(REPOSITORY / "mini" / "checkpoint"), None, "mini", device="cpu")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Picture files of every odd kind by name, each with its pixels."""
    import odd_files

    return odd_files.write(tmp_path_factory.mktemp("odd files"))


def pytest_configure(config):
    if config.getoption("run_slow"):  # the order of pytest_collection_modifyitems, not that of most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    if config.getoption("run_slow"):
        # A file is one worker's. One that takes minutes comes early, so that no worker is left alone with it.
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)
    skips = {}
    if not config.getoption("run_slow") and not config.getoption("soak"):
        skips["slow"] = pytest.mark.skip(reason="slow: run with --all")
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


def skipped_for_want(session) -> list[str]:
    """Where and why tests were skipped that would run if something were installed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    found = []
    for report in reporter.stats.get("skipped", []):
        path, line, reason = report.longrepr
        if not reason.removeprefix("Skipped: ").startswith(NOTHING_TO_INSTALL):
            found.append(f"{path}:{line}: {reason}")
    return found


def pytest_sessionfinish(session):
    if (
        session.config.getoption("complete")
        and not hasattr(session.config, "workerinput")
        and skipped_for_want(session)
    ):
        session.exitstatus = max(session.exitstatus, pytest.ExitCode.TESTS_FAILED)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("complete"):
        for line in skipped_for_want(terminalreporter._session):
            terminalreporter.write_line(f"error: skipped for want of something to install: {line}", red=True)
