"""The page that answers a question about an image with and without compression, and the application around
it."""

import html
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from libra import Compression
from libra.media import SERVED, open_image
from libra.methods import METHODS
from libra.rows import CONFIGS, Row, get_model
from libra.utils.server import guarded

from . import overlay
from .session import Loaded, Session
from .uploads import Uploads, UploadsOnly

OWN = "my own, set below"
# The page's own host only, whatever the page asks for, and in no other page's frame.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"
REQUEST_BYTES = 256 * 1024  # without an upload
WAITING = 20  # questions in the queue
SESSIONS = 100  # browsers whose fields Gradio remembers
STYLE = ".remark { color: #b45309; font-weight: 600 }"
METHODS_OFFERED = [name for name, method in METHODS.items() if method.places]


class Mistake(ValueError):
    """Something that the user can mend; ``field`` is where the page says so."""

    def __init__(self, field: str, sentence: str):
        super().__init__(sentence)
        self.field = field


@dataclass
class Outcome:
    """What one run of the model gave; ``drawings`` are the image with its tokens' fates, one a compression
    layer."""

    answer: str
    first_token: float
    seconds: float
    visual_tokens: list[int]
    drawings: list[tuple[Image.Image, str]]


def fitting_rows(model, folder: Path = CONFIGS) -> dict[str, Compression]:
    """The compressions of the table rows in a folder, and one folder deeper, that are made for a model of
    this one's sizes, by their files' names; each once."""
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
    amount = c.amount if not isinstance(c.ratio, float) else f"{c.ratio:.0%}"
    name = c.method or (c.name if c.steps else f"{c.select} + {c.merge}")
    return f"{name}, {amount} {c.where}"


def own_compression(method: str, layers: str, ratio: float) -> Compression:
    """From the page's fields; ``layers`` are numbers with commas or spaces between them.

    Raises:
        ValueError: for layers that are no numbers, and for what a compression refuses.
    """
    if method not in METHODS_OFFERED or not isinstance(layers, str) or not isinstance(ratio, (int, float)):
        raise ValueError("choose a method, and give layers and a ratio")
    try:
        numbers = [int(layer) for layer in layers.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"the layers {layers!r} are not numbers; write for example 2, 5, 8") from None
    if not numbers:
        raise ValueError("there are no layers to compress after; write for example 2, 5, 8")
    return Compression(method=method, layers=numbers, ratio=ratio)


def answer(
    loaded: Loaded, image: Image.Image, question: str, compression: Compression | None, tokens: int
) -> Outcome:
    """The model's answer of at most ``tokens`` tokens to a question about one image.

    Raises:
        ValueError: for a compression that does not fit the model, or a question that is too long.
    """
    loaded.model.set_compression(compression, trace=True)
    session = Session(**vars(loaded), images=[image], typed_places=False)
    given = session.ask(question, max_new_tokens=tokens)
    return Outcome(
        given.text, given.first_token, given.seconds, session.visual_tokens, _drawings(loaded.model, image)
    )


def _drawings(model, image: Image.Image) -> list[tuple[Image.Image, str]]:
    trace, boxes = model.compression_trace, overlay.token_boxes(image.size, model)
    if not trace or boxes is None:
        return []
    return [
        (
            overlay.draw_stage(image, boxes, stage),
            f"after layer {stage.layer}: {len(trace[0].kept(i))} tokens left",
        )
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
        "visual tokens of an average layer": [
            f"{sum(run.visual_tokens) / len(run.visual_tokens):.0f}" for run in both
        ],
    }
    lines = [f"| {name} | {plain} | {short} |" for name, (plain, short) in rows.items()]
    return "\n".join(["| | vanilla | compressed |", "|---|--:|--:|", *lines])


def warm_up(loaded: Loaded) -> None:
    """A first call is slow."""
    grey = Image.new("RGB", (96, 96), "grey")
    for compression in (None, Compression(layers=[0])):
        answer(loaded, grey, "what is this ?", compression, 4)


@dataclass
class Asker:
    """Answers what the page's fields hold. Whatever they hold: a browser may send anything.

    Args:
        rows: the compressions to choose from, by name.
        tokens: of an answer, at most.
    """

    loaded: Loaded
    rows: dict[str, Compression]
    uploads: Uploads
    tokens: int

    def __post_init__(self):
        self._alone = threading.Lock()  # a model has one compression

    def __call__(self, picture, question, choice, method, layers, ratio) -> tuple[Outcome, Outcome, str]:
        """The outcomes without and with compression, and what the image's reader noted. Raises Mistake."""
        image, notes = self._image(picture)
        if not isinstance(question, str) or not question.strip():
            raise Mistake("question", "write a question")
        try:
            if choice == OWN:
                compression = own_compression(method, layers, ratio)
            elif isinstance(choice, str) and choice in self.rows:
                compression = self.rows[choice]
            else:
                raise ValueError("choose a compression from the list")
            compression.check_layers(self.loaded.model.config.num_hidden_layers)
        except ValueError as error:
            raise Mistake("compression", str(error)) from error
        try:
            with self._alone:
                both = [
                    answer(self.loaded, image, question.strip(), c, self.tokens) for c in (None, compression)
                ]
        except ValueError as error:
            raise Mistake("question", str(error)) from error
        return *both, notes

    def _image(self, picture) -> tuple[Image.Image, str]:
        if not isinstance(picture, dict) or not isinstance(picture.get("path"), str):
            raise Mistake("image", "give an image")
        name, notes = picture.get("orig_name"), []

        def say(what: str, remark: str) -> None:
            notes.append(f"{what} {remark}")

        try:
            data = self.uploads.read(picture["path"])
            image = open_image(data, SERVED, name=name if isinstance(name, str) else "uploaded", say=say)
        except ValueError as error:
            raise Mistake("image", str(error)) from error
        return image, "; ".join(notes)


def build_page(loaded: Loaded, name: str, tokens: int, uploads: Uploads, shown: list[list[str]]):
    """The Gradio page of a loaded model; ``shown`` are example images with their questions."""
    import gradio as gr

    rows = fitting_rows(loaded.model)
    asker, fields = Asker(loaded, rows, uploads, tokens), ("image", "question", "compression")

    def remarks(**texts: str):
        """What stands next to the fields; nothing at the others."""
        return [
            gr.update(value=html.escape(texts.get(field, "")), visible=field in texts) for field in fields
        ]

    def ask(*values):
        try:
            vanilla, compressed, notes = asker(*values)
        except Mistake as mistake:
            return [gr.skip()] * 4 + remarks(**{mistake.field: str(mistake)})
        except Exception:
            traceback.print_exc()
            return [gr.skip()] * 4 + remarks(
                question="this did not work, through no fault of yours; the server's log says why"
            )
        results = [vanilla.answer, compressed.answer, table(vanilla, compressed), compressed.drawings]
        return results + remarks(**({"image": notes} if notes else {}))

    with gr.Blocks(title="Libra-Merging", analytics_enabled=False) as page:
        gr.Markdown(f"## Libra-Merging: {name}, with and without compression")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                asked, remark_places, button = _question(loaded, rows, shown)
            with gr.Column(scale=5, min_width=480):
                answered = _answer()
        # Without preprocessing, since only the gate opens pictures.
        gr.on(
            [button.click, asked[1].submit],
            ask,
            asked,
            [*answered, *remark_places],
            preprocess=False,
            concurrency_limit=1,
            api_name="ask",
        )
    page.state_session_capacity = SESSIONS
    page.has_launched = True  # or Gradio, mounted, skips its own question whether a file was uploaded
    return page.queue(max_size=WAITING, api_open=False)


def _question(loaded: Loaded, rows: dict, shown: list[list[str]]):
    """The page's left side: the inputs of :class:`Asker` in order, the places for remarks on picture,
    question and compression, and the button."""
    import gradio as gr

    layers = loaded.model.config.num_hidden_layers
    choices = [*rows, OWN]
    labels = [*(f"{name.removesuffix('.yaml')}: {in_words(c)}" for name, c in rows.items()), OWN]
    usual = ", ".join(str(layers * k // 4 - 1) for k in (1, 2, 3)) if layers >= 4 else "0"
    first = next((choice for choice in choices if "r50" in choice), choices[0])

    def remark():
        return gr.HTML(visible=False, elem_classes="remark")

    image = gr.Image(sources=["upload", "clipboard"], label="Image", height=260)
    remarks = [remark()]
    question = gr.Textbox(label="Question", placeholder="how many digits are there ?")
    remarks.append(remark())
    choice = gr.Dropdown(
        list(zip(labels, choices)),
        value=first,
        label="Compression (how much is removed after which layers)",
    )
    with gr.Group(visible=first == OWN) as own:
        method = gr.Dropdown(METHODS_OFFERED, value="libra", label="Method")
        at = gr.Textbox(usual, label=f"After layers (0 to {layers - 1})")
        ratio = gr.Slider(0, 0.95, value=0.5, step=0.05, label="Removed at each of them")
    remarks.append(remark())
    button = gr.Button("Ask", variant="primary")
    if shown:
        gr.Examples(shown, inputs=[image, question], label="Examples")
    choice.change(lambda chosen: gr.update(visible=chosen == OWN), choice, own)
    return [image, question, choice, method, at, ratio], remarks, button


def _answer() -> list:
    """The page's right side: both answers, the figures, the pictures of what was done to the tokens."""
    import gradio as gr

    with gr.Row():
        vanilla = gr.Textbox(label="Vanilla", lines=2)
        compressed = gr.Textbox(label="Compressed", lines=2)
    figures = gr.Markdown()
    gr.Markdown(f"What each compression layer does to the visual tokens: {overlay.LEGEND}")
    gallery = gr.Gallery(show_label=False, columns=3, height=310, object_fit="contain")
    gr.Markdown(
        "Times are of one run each, vanilla first, vision tower included. A first call is slower (warm-up); "
        "it was made when the page started."
    )
    return [vanilla, compressed, figures, gallery]


def build_app(page, uploads: Uploads, hosts: Sequence[str], per_minute: int):
    """The page as an ASGI application behind the gate, which lets a browser load from nowhere else."""
    import gradio as gr
    from fastapi import FastAPI

    async def at_home(scope, receive, send):
        async def sending(message):
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        await app(scope, receive, sending)

    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        show_error=False,
        run_history=False,
        max_file_size=SERVED.bytes,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        footer_links=[],
        css=STYLE,
    )
    upload = {"/gradio_api/upload": SERVED.bytes + 64 * 1024}  # the form around the file
    return guarded(
        UploadsOnly(at_home, uploads), hosts, per_minute=per_minute, body_bytes=REQUEST_BYTES, larger=upload
    )
