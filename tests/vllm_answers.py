"""vLLM in a process of its own: python tests/vllm_answers.py JOBS ANSWERS reads jobs and writes what vLLM
said, both JSON. Only tests/test_vllm_engine.py and tests/vllm_throughput.py start it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


def run(folder: Path, jobs: list[dict], compression: dict | None = None, **environment: str) -> list:
    """What vLLM says to each job, see :func:`answers`; one engine after another, in one process.

    compression: of a file for LIBRA_COMPRESSION; None leaves it out.

    Raises AssertionError with the process's last lines where it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **SETTINGS, **environment, "PYTHONPATH": str(ROOT)}
    if compression is not None:
        (folder / "row.yaml").write_text(json.dumps(compression))
        environment["LIBRA_COMPRESSION"] = str(folder / "row.yaml")
    command = [sys.executable, __file__, folder / "jobs.json", folder / "answers.json"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    return json.loads((folder / "answers.json").read_text())


def answers(job: dict) -> list[dict] | str:
    """Of each call of a job: its ``seconds``, the answers' ``texts`` and ``ids``, and the prompts'
    ``lengths``, their ``pictures`` (placeholders) and how many of their tokens came out of the prefix cache
    (``cached``). Of a job that is ``refused``: the sentence.

    job: ``engine``, keyword arguments of vLLM's LLM; ``calls``, each with ``prompts`` (``text``, the
    pictures' ``files`` and, where it has them, ``kwargs`` for the processor), ``most`` tokens an answer, and
    ``token``, the placeholder's id.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(**job["engine"])
        return [_said(llm, call) for call in job["calls"]]
    except ValueError as error:
        if not job.get("refused"):
            raise
        return str(error)
    finally:
        llm = None
        cleanup_dist_env_and_memory()


def _said(llm, call: dict) -> dict:
    from PIL import Image
    from vllm import SamplingParams

    prompts = [
        {
            "prompt": prompt["text"],
            "multi_modal_data": {"image": [Image.open(file).convert("RGB") for file in prompt["files"]]},
            **({"mm_processor_kwargs": prompt["kwargs"]} if prompt.get("kwargs") else {}),
        }
        for prompt in call["prompts"]
    ]
    sampling = SamplingParams(temperature=0, max_tokens=call["most"], ignore_eos=call.get("endless", False))
    started = time.perf_counter()
    said = llm.generate(prompts, sampling, use_tqdm=False)
    return {
        "seconds": time.perf_counter() - started,
        "texts": [one.outputs[0].text.strip() for one in said],
        "ids": [list(one.outputs[0].token_ids) for one in said],
        "lengths": [len(one.prompt_token_ids) for one in said],
        "pictures": [one.prompt_token_ids.count(call["token"]) for one in said],
        "cached": [one.num_cached_tokens for one in said],
    }


if __name__ == "__main__":
    found = [answers(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[2]).write_text(json.dumps(found))
