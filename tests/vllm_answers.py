"""vLLM in a process of its own: python tests/vllm_answers.py JOB ANSWERS reads a job and writes what vLLM
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


def run(folder: Path, job: dict, compression: object = None, **environment: str) -> list[dict]:
    """What vLLM says to a job's calls, see :func:`answers`.

    compression: the value of LIBRA_COMPRESSION, or a mapping for a file of it; None leaves it out.

    Raises AssertionError with the process's last lines where it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **SETTINGS, **environment, "PYTHONPATH": str(ROOT)}
    if isinstance(compression, dict):
        (folder / "row.yaml").write_text(json.dumps(compression))
        compression = folder / "row.yaml"
    if compression is not None:
        environment["LIBRA_COMPRESSION"] = str(compression)
    command = [sys.executable, __file__, folder / "job.json", folder / "answers.json"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    return json.loads((folder / "answers.json").read_text())


def answers(job: dict) -> list[dict]:
    """Of each call of a job: its ``seconds``, the answers' ``texts`` and ``ids``, and the prompts'
    ``lengths``, their ``pictures`` (placeholders) and how many of their tokens came out of the prefix cache
    (``cached``).

    job: ``engine``, keyword arguments of vLLM's LLM; ``calls``, each with ``prompts`` (``text``, the
    pictures' ``files`` and, where it has them, ``kwargs`` for the processor), ``most`` tokens an answer, and
    ``token``, the placeholder's id.
    """
    from PIL import Image
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    found = []
    for call in job["calls"]:
        prompts = [
            {
                "prompt": prompt["text"],
                "multi_modal_data": {"image": [Image.open(file).convert("RGB") for file in prompt["files"]]},
                **({"mm_processor_kwargs": prompt["kwargs"]} if prompt.get("kwargs") else {}),
            }
            for prompt in call["prompts"]
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=call["most"], ignore_eos=call.get("endless", False)
        )
        started = time.perf_counter()
        said = llm.generate(prompts, sampling, use_tqdm=False)
        found.append(
            {
                "seconds": time.perf_counter() - started,
                "texts": [one.outputs[0].text.strip() for one in said],
                "ids": [list(one.outputs[0].token_ids) for one in said],
                "lengths": [len(one.prompt_token_ids) for one in said],
                "pictures": [one.prompt_token_ids.count(call["token"]) for one in said],
                "cached": [one.num_cached_tokens for one in said],
            }
        )
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answers(json.loads(Path(sys.argv[1]).read_text()))))
