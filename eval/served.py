"""Cells that OpenAI-compatible servers answer, this project's (libra.serve) or vLLM's with the plug-in: one
worker a server, and lmms-eval's own client in it."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from libra.budget import actual, keeps
from libra.config import BUDGETS, NOTHING
from libra.identity import code_digests
from libra.rows import Row, get_model

from .cells import Cell, check_unchanged, code
from .harness import Harness, Settings
from .suites import Table, get_task

OURS, VLLM = "libra.serve", "vLLM"
OWNERS = {"libra": OURS, "vllm": VLLM}
PATIENCE = 600.0  # seconds in which a server that was stopped may come back
PAUSE = 1.0


@dataclass(frozen=True)
class Server:
    """A server, and what it says of itself.

    engine, version, model: what answers; compression: keys of the one that it does, None where every request
    names its own.
    """

    url: str
    engine: str
    version: str
    model: str
    compression: dict | None = None

    @property
    def identity(self) -> dict:
        """What its answers depend on, wherever it is, and the code that asks for them."""
        said = {"engine": self.engine, "version": self.version, "model": self.model}
        return {**said, "asked_by": code_digests({"served": [Path(__file__)]})["served"]}


def ask(url: str) -> Server:
    """What the server at ``url`` says of itself. Raises ValueError, in one sentence, for one that does not
    answer or is neither of the two."""
    url = url.rstrip("/").removesuffix("/v1")
    said = _get(f"{url}/v1/models")
    try:
        entries = said["data"]
        engine = OWNERS.get(entries[0]["owned_by"])
        names = [str(entry["id"]) for entry in entries]
    except (KeyError, IndexError, TypeError):
        engine = None
    if engine is None:
        raise ValueError(f"{url}: this is neither {OURS} nor vLLM: /v1/models says nothing that they say")
    if engine == OURS:
        return Server(url, engine, str(entries[0].get("version")), names[0])
    version, told = str(_get(f"{url}/version").get("version")), [_settings(name) for name in names]
    own = next((settings for settings in told if settings is not None), None)
    if own is None:
        raise ValueError(
            f"{url}: this vLLM server does not say how it compresses; start it with scripts/serve_vllm.sh, or"
            ' give it a second name: --served-model-name NAME "$(python -m libra.vllm ROW)"'
        )
    model = next((name for name, settings in zip(names, told) if settings is None), names[0])
    return Server(url, engine, f"{version}, libra {own.pop('libra')}", model, own)


def _get(address: str) -> dict:
    import httpx

    try:
        answer = httpx.get(address, headers={"Authorization": f"Bearer {_key()}"}, timeout=30)
        answer.raise_for_status()
        said = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
        raise ValueError(
            f"{address} does not answer ({str(error) or type(error).__name__}); start the server, or correct"
            " the address"
        ) from error
    if not isinstance(said, dict):
        raise ValueError(f"{address} answers with something else than a JSON object; correct the address")
    return said


def _key() -> str:
    return os.environ.get("LIBRA_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"


def _settings(name: str) -> dict | None:
    """The compression that a served model's name tells; None for an ordinary name."""
    try:
        found = json.loads(name)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "libra" in found else None


def ask_all(urls: Sequence[str]) -> list[Server]:
    """Raises ValueError also where they are not alike."""
    servers = [ask(url) for url in urls]
    for server in servers:
        if server.identity != servers[0].identity:
            raise ValueError(
                f"the servers differ: {servers[0].url} is {_words(servers[0])}, {server.url} is"
                f" {_words(server)}; one table needs one kind"
            )
    return servers


def _words(server: Server) -> str:
    return f"{server.engine} {server.version} with {server.model}"


def body(server: Server, row: Row) -> dict:
    """What a request adds so that the server does what the row says. Raises ValueError where it cannot."""
    if row.attention != "sdpa":
        raise ValueError(
            f"row {row.name}: attention: {row.attention} is the server's to choose; leave the row out, or run"
            " it without --server"
        )
    c = row.compression
    wanted = c.to_dict() if c.compresses else {}
    if server.engine == OURS:
        return {"compression": wanted or "vanilla"}
    own = server.compression or {}
    if wanted == own:
        return {}
    if own and not wanted:
        return {"mm_processor_kwargs": {"libra_ratio": 0}}
    if own and _but_budget(wanted) == _but_budget(own) and (ratio := _ratio(row)) is not None:
        return {"mm_processor_kwargs": {"libra_ratio": ratio}}
    raise ValueError(
        f"row {row.name}: {server.url} compresses by {json.dumps(own) if own else 'nothing'}, which is not"
        " this row; start a server with this row, or choose rows that differ in ratio or keep only"
    )


def extra(server: Server, row: Row) -> dict:
    """All that a request adds: :func:`body`, and to vLLM's the tokenizer's first token, which LLaVA's chat
    templates leave to the tokenizer and vLLM leaves out. A model whose template writes that token itself
    would get it twice; those of the tables' rows (LLaVA, Qwen) do not. Raises ValueError as :func:`body`."""
    return {**({"add_special_tokens": True} if server.engine == VLLM else {}), **body(server, row)}


def _ratio(row: Row) -> float | None:
    """The share of a picture's tokens that the row removes; None where it does not say one for all
    pictures."""
    c, tokens = row.compression, get_model(row.model, row.path).visual_tokens
    if isinstance(c.ratio, float):
        return c.ratio
    if c.keep is None or c.adaptive or len(tokens) != 1:
        return None
    wanted = keeps([tokens], c)
    ratio = 1 - wanted[0][0] / tokens[0]
    return ratio if keeps([tokens], replace(c, keep=None, ratio=ratio)) == wanted else None


def _but_budget(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if key not in BUDGETS}


def check_rows(table: Table, rows: Mapping[str, Row], servers: Sequence[Server]) -> dict:
    """What a run's settings say of the servers that answer it. Raises ValueError where one of them cannot
    answer a row of the table."""
    if table.timed or any(map(table.trained_for, rows)):
        raise ValueError(
            f"table {table.name} times its rows, or compares fine-tuned checkpoints, which servers do not do:"
            " run it without --server"
        )
    for server in servers:
        for row in rows.values():
            body(server, row)
    return servers[0].identity


class Refusal(BaseException):
    """A request that no further try would answer. Not an Exception, which the client would try again."""


class Asking:
    """In place of the client's ``chat.completions``: adds to each request what the row needs, and waits for a
    server that is down.

    check: called when a server is back; raises Refusal where it is not the one that it was.
    """

    def __init__(self, completions, added: dict, url: str, check: Callable[[], None]):
        self.completions, self.added, self.url, self.check = completions, added, url, check

    def create(self, **payload):
        import openai

        end = time.monotonic() + PATIENCE
        while True:
            try:
                answer = self.completions.create(**payload, extra_body=self.added)
                break
            except (
                openai.APIConnectionError,
                openai.InternalServerError,
                openai.RateLimitError,
            ) as error:
                if time.monotonic() > end:
                    raise Refusal(f"{self.url} does not answer any more: {error}") from error
                time.sleep(PAUSE)
                self.check()
            except openai.APIError as error:
                raise Refusal(f"{self.url} refuses a request: {error}") from error
        told = getattr(answer.usage, "compression", None)
        if told is not None and told["settings"] != self._settings():
            raise Refusal(f"{self.url} compressed by {told['settings']}, which is not what was asked")
        return answer

    def _settings(self) -> dict:
        asked = self.added["compression"]
        return NOTHING.to_dict() if asked == "vanilla" else asked


class ServedHarness(Harness):
    """A worker's harness whose device is the address of a server."""

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.url = settings.device

    def __call__(self, cell: Cell, on_samples: Callable[[int], None]) -> dict:
        """As :class:`~eval.harness.Harness`, with ``server``: what answered, what it ``does`` by itself
        and what it was ``asked`` to do."""
        from libra.lmms.lmms_libra import is_answer
        from libra.lmms.samples import SampleLog

        from .served_model import ServedModel

        server = ask(self.url)
        check_unchanged(cell, {"server": server.identity, "code": code()})
        task = get_task(cell.task)
        with SampleLog(cell.samples_path(Path(self.settings.output)), cell.config_hash, is_answer) as log:
            model = ServedModel(server, _key(), self.settings.batch_size)
            model.client = self._client(model.client, server, cell.spec)
            model.sees = SimpleNamespace(
                log=log, on_samples=on_samples, blind=cell.blind, tokens=tokens(cell.spec)
            )
            try:
                results = self._evaluate(cell, task, model)
            except Refusal as refusal:
                raise ValueError(str(refusal)) from refusal
        told = {"url": server.url, **server.identity, "does": server.compression}
        told["asked"] = extra(server, cell.spec)
        return {**self._result(results, task, list(model.records.values())), "server": told}

    def _client(self, client, server: Server, row: Row) -> SimpleNamespace:
        def check() -> None:
            try:
                now = ask(self.url)
            except ValueError:
                return  # still down
            if now != server:
                raise Refusal(f"{self.url} came back as {_words(now)}; it was {_words(server)}")

        asking = Asking(client.chat.completions, extra(server, row), server.url, check)
        return SimpleNamespace(chat=SimpleNamespace(completions=asking))


def tokens(row: Row) -> list[int]:
    """The visual tokens that each layer sees by the row; empty where they depend on the picture."""
    spec = get_model(row.model, row.path)
    c = row.compression
    if len(spec.visual_tokens) != 1 or not c.compresses or c.adaptive:
        return []
    return actual(c, spec.layers, spec.visual_tokens)
