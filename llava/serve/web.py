"""A page that answers a question about an image with and without compression: ``python -m llava.serve.web``."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from libra import Compression
from libra.cli import Parser
from libra.config import Row
from libra.methods import METHODS
from libra.provenance import REPOSITORY
from libra.registry import get_model

from . import overlay
from .options import add_model_options
from .session import Loaded, Session, load_model

EMBEDDED = REPOSITORY / "mini" / "checkpoint"
OWN = "my own, set below"
EXAMPLES = """example:
  python -m llava.serve.web
  python -m llava.serve.web --model-path liuhaotian/llava-v1.5-7b --port 8000

Without --model-path it shows the embedded model, which knows handwritten digits and coloured shapes."""
# The page's own host only, whatever the page asks for.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


@dataclass
class Outcome:
    """What one run of the model gave; ``drawings`` are the image with its tokens' fates, one a compression layer."""

    answer: str
    first_token: float
    seconds: float
    visual_tokens: list[int]
    drawings: list[tuple[Image.Image, str]]


def fitting_rows(model, folder: Path = REPOSITORY / "configs") -> dict[str, Compression]:
    """The compressions of the table rows in a folder, and one folder deeper, that are made for a model of this one's sizes, by
    their files' names; each once."""
    fitting = {}
    for path in [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]:
        row = Row.from_yaml(path)
        spec, config = get_model(row.model, str(path)), model.config
        sizes = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        fits = (spec.layers, spec.hidden_size, spec.intermediate_size) == sizes
        if fits and row.compression.layers and row.compression not in fitting.values():
            fitting[path.relative_to(folder).as_posix()] = row.compression
    return fitting


def in_words(c: Compression) -> str:
    """A compression in a few words."""
    layers = ", ".join(map(str, c.layers))
    return f"{c.method or f'{c.select} + {c.merge}'}, {c.ratio:.0%} after {layers}"


def own_compression(method: str, layers: str, ratio: float) -> Compression:
    """From the page's fields; ``layers`` are numbers with commas or spaces between them.

    Raises:
        ValueError: for layers that are no numbers, and for what a compression refuses.
    """
    try:
        numbers = [int(layer) for layer in layers.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"the layers {layers!r} are not numbers; write for example 2, 5, 8") from None
    if not numbers:
        raise ValueError("there are no layers to compress after; write for example 2, 5, 8")
    return Compression(method=method, layers=numbers, ratio=ratio)


def answer(loaded: Loaded, image: Image.Image, question: str, compression: Compression | None, tokens: int) -> Outcome:
    """The model's answer of at most ``tokens`` tokens to a question about one image.

    Raises:
        ValueError: for a compression that does not fit the model, or a question that is too long or has places for images.
    """
    loaded.model.set_compression(compression, trace=True)
    session = Session(**vars(loaded), images=[image])
    given = session.ask(question, max_new_tokens=tokens)
    return Outcome(given.text, given.first_token, given.seconds, session.visual_tokens, _drawings(loaded.model, image))


def _drawings(model, image: Image.Image) -> list[tuple[Image.Image, str]]:
    trace, boxes = model.compression_trace, overlay.token_boxes(image.size, model)
    if not trace or boxes is None:
        return []
    return [
        (overlay.draw_stage(image, boxes, stage), f"after layer {stage.layer}: {len(trace[0].kept(i))} tokens left")
        for i, stage in enumerate(trace[0].stages)
    ]


def table(vanilla: Outcome, compressed: Outcome) -> str:
    """Times and visual tokens of both in Markdown."""

    def stages(counts: Sequence[int]) -> str:
        return " → ".join(str(n) for i, n in enumerate(counts) if i == 0 or n != counts[i - 1])

    both = (vanilla, compressed)
    rows = {
        "seconds to the first token": [f"{run.first_token:.3f}" for run in both],
        "seconds for the whole answer": [f"{run.seconds:.3f}" for run in both],
        "visual tokens, stage by stage": [stages(run.visual_tokens) for run in both],
        "visual tokens of an average layer": [f"{sum(run.visual_tokens) / len(run.visual_tokens):.0f}" for run in both],
    }
    lines = [f"| {name} | {plain} | {short} |" for name, (plain, short) in rows.items()]
    return "\n".join(["| | vanilla | compressed |", "|---|--:|--:|", *lines])


def examples(folder: Path) -> list[list[str]]:
    """Images of the embedded benchmark, written to a folder, with their questions; none where its packages are missing."""
    try:
        from mini.benchmark import scene_sample

        samples = [scene_sample(kind, 0) for kind in ("counting", "color", "reading", "relation")]
    except ImportError:
        return []
    rows = []
    for i, sample in enumerate(samples):
        path = folder / f"example{i}.png"
        sample.image.save(path)
        rows.append([str(path), sample.question])
    return rows


def build_page(loaded: Loaded, name: str, tokens: int, shown: list[list[str]]):
    """The Gradio page of a loaded model; ``shown`` are example images with their questions."""
    import gradio as gr

    rows, layers = fitting_rows(loaded.model), loaded.model.config.num_hidden_layers
    choices = [*rows, OWN]
    labels = [*(f"{name.removesuffix('.yaml')}: {in_words(c)}" for name, c in rows.items()), OWN]
    usual = ", ".join(str(layers * k // 4 - 1) for k in (1, 2, 3)) if layers >= 4 else "0"
    first = next((choice for choice in choices if "r50" in choice), choices[0])

    def ask(image, question, choice, method, at, ratio):
        try:
            if image is None or not (question or "").strip():
                raise ValueError("give an image and a question")
            compression = own_compression(method, at, ratio) if choice == OWN else rows[choice]
            compression.check_layers(layers)
            both = [answer(loaded, image, question.strip(), c, tokens) for c in (None, compression)]
        except ValueError as error:
            gr.Warning(str(error))
            return "", "", "", []
        return both[0].answer, both[1].answer, table(*both), both[1].drawings

    with gr.Blocks(title="Libra-Merging", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"## Libra-Merging: {name}, with and without compression")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(type="pil", sources=["upload", "clipboard"], label="Image", height=260)
                question = gr.Textbox(label="Question", placeholder="how many digits are there ?")
                choice = gr.Dropdown(
                    list(zip(labels, choices)), value=first, label="Compression (how much is removed after which layers)"
                )
                with gr.Group(visible=first == OWN) as own:
                    method = gr.Dropdown([m for m in METHODS if m != "vanilla"], value="libra", label="Method")
                    at = gr.Textbox(usual, label=f"After layers (0 to {layers - 1})")
                    ratio = gr.Slider(0, 0.95, value=0.5, step=0.05, label="Removed at each of them")
                button = gr.Button("Ask", variant="primary")
                if shown:
                    gr.Examples(shown, inputs=[image, question], label="Examples")
            with gr.Column(scale=5, min_width=480):
                with gr.Row():
                    vanilla = gr.Textbox(label="Vanilla", lines=2)
                    compressed = gr.Textbox(label="Compressed", lines=2)
                figures = gr.Markdown()
                gr.Markdown(f"What each compression layer does to the visual tokens: {overlay.LEGEND}")
                gallery = gr.Gallery(show_label=False, columns=3, height=310, object_fit="contain")
                gr.Markdown(
                    "Times are of one run each, vanilla first, vision tower included. A first call is slower (warm-up); it was"
                    " made when the page started."
                )
        choice.change(lambda chosen: gr.update(visible=chosen == OWN), choice, own)
        fields = [image, question, choice, method, at, ratio]
        # One at a time: a model has one compression.
        gr.on([button.click, question.submit], ask, fields, [vanilla, compressed, figures, gallery], concurrency_limit=1)
    return page


def build_app(page):
    """The page as an ASGI application that lets a browser load from nowhere else."""
    import gradio as gr
    from fastapi import FastAPI

    app = FastAPI()

    @app.middleware("http")
    async def keep_at_home(request, call_next):
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    return gr.mount_gradio_app(app, page, path="/")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ValueError where there can be none."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{host}:{port} cannot be used ({reason}); choose another --port or --host") from None


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server at that address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m llava.serve.web", description="Compare answers with and without compression in a browser.",
        epilog=EXAMPLES,
    )
    add_model_options(parser, model_path=os.path.relpath(EMBEDDED))
    parser.set_defaults(max_new_tokens=128)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (default 7860; 0 takes a free one)")
    args = parser.parse_args(argv)
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the folder with what was uploaded goes
    with tempfile.TemporaryDirectory(prefix="libra-web-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported
        try:
            import gradio  # noqa: F401
            import uvicorn
        except ImportError as error:
            parser.error(f"the page needs gradio ({error}); install it: pip install gradio")
        try:
            server = listen(args.host, args.port)
            loaded = load_model(args)
            page = build_page(loaded, args.model_path, args.max_new_tokens, examples(Path(folder)))
        except ValueError as error:
            parser.error(str(error))
        grey = Image.new("RGB", (96, 96), "grey")
        for compression in (None, Compression(layers=[0])):
            answer(loaded, grey, "what is this ?", compression, 4)
        host, port = server.getsockname()[:2]
        if not is_local(args.host):
            print(f"warning: whoever reaches {host}:{port} can use this page; it asks for no password", file=sys.stderr)
        print(f"open http://{f'[{host}]' if ':' in host else host}:{port} in a browser; Ctrl-C ends", flush=True)
        with suppress(KeyboardInterrupt):
            settings = uvicorn.Config(build_app(page), log_level="warning", timeout_graceful_shutdown=2)
            uvicorn.Server(settings).run(sockets=[server])


if __name__ == "__main__":
    main()
