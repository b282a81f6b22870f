"""What the vision tower of an attached model says about its pictures.

The attention modules of the tower's layers bear a mark, as those of the decoder do, and hand their queries
and keys to whoever listens in this thread. What is read there is brought into the order of the visual tokens
by the model's own functions, which put its features together.
"""

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

from ..config import Compression, ConfigError
from ..methods import SELECTORS
from ..places import BEFORE, INPUT, TOWER
from ..rows import patches_across
from . import calls, score
from .arrangement import ARRANGERS, Plain
from .families import JOINING, TOWERS
from .relevance import Asked, ClipRelevance
from .shrunk import Shrunk
from .structure import attention_modules
from .tokens import IGNORE_INDEX, Prefill, Seen
from .tower import (
    RELEVANCE,
    Left,
    Listener,
    Look,
    Wants,
    compress_pictures,
    context_of,
    left_of_rows,
)

LOOKS = "libra_looks"  # attribute of what `get_image_features` returns
_LISTENER: ContextVar["Listener | None"] = ContextVar("libra_listener", default=None)


class TowerMark(score.Mark):
    """On the attention modules of one layer of a vision tower."""

    def __init__(self, layer: int):
        self.layer = layer

    def read(self, query, key, attention_mask, options: dict) -> None:
        """Called by the attention itself."""
        listener = _LISTENER.get()
        if listener is not None:
            listener.hear(self.layer, query, key, attention_mask, options)


class Features:
    """In place of a model body's ``get_image_features`` or ``get_video_features`` while it is attached: the
    same, with :class:`Look` of each picture next to what it returns."""

    def __init__(self, eyes: "Eyes", name: str):
        self.eyes, self.name = eyes, name

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own)

    @property
    def _own(self) -> Callable:
        return getattr(type(self.eyes.body), self.name).__get__(self.eyes.body)

    @torch.compiler.disable
    def __call__(self, *args, **kwargs):
        return self.eyes.look(self.name, self._own, args, kwargs)


class Eyes:
    """What an attached model is asked about its pictures, and how the answers become a call's :class:`Seen`.

    Raises ValueError where the model cannot give what a method needs.
    """

    def __init__(
        self,
        body: torch.nn.Module,
        decoder,
        name: str,
        compression: Compression,
        clip: ClipRelevance | None = None,
    ):
        self.body, self.decoder, self.name, self.clip = body, decoder, name, clip
        self.kind = TOWERS.get(name)
        self.wants: Wants | None = None
        self.shrunk: Shrunk | None = None
        self.compression = compression
        asks = Wants.of(compression, has_cls=True)
        if self.kind is None:
            if asks is not None:
                raise ValueError(
                    f"{compression.name} needs what the vision tower says, and nobody has looked at how"
                    f" {name} puts its features together; choose a method that reads embeddings"
                )
            return
        self.tower = next(
            getattr(body, place)
            for place in ("vision_tower", "vision_model", "visual")
            if hasattr(body, place)
        )
        self.has_cls = getattr(body.config, "vision_feature_select_strategy", "full") == "default"
        self._check_clip()
        self.wants = Wants.of(compression, self.has_cls, clip is not None)
        self._shrink()
        if self.kind in JOINING and any(part.at == TOWER for part in compression.parts):
            self.compression = _at_input(compression, name)
        if self.wants is None:
            return
        layers = self._layers()
        chosen = getattr(body.config, "vision_feature_layer", -1)
        chosen = chosen if isinstance(chosen, int) else chosen[-1]
        self.used, self.depth = chosen % (len(layers) + 1) - 1, len(layers)
        for number in self._listener().layers:
            for module in attention_modules(layers[number]):
                setattr(module, score.MARK, TowerMark(number))

    def _listener(self) -> Listener:
        return Listener.of(self.wants, self.has_cls, self.used, self.depth)

    def _check_clip(self) -> None:
        if self.clip is None:
            return
        width = getattr(self.tower.config, "hidden_size", None)
        if self.kind in JOINING or width != self.clip.width:
            raise ValueError(
                f"clip: its vision tower has features of width {self.clip.width}, and those of this"
                f" {self.name} are not CLIP's or have width {width}; leave clip out, and text embeddings"
                " are compared"
            )

    def _shrink(self) -> None:
        """Find out whether the tower is to see smaller pictures. Raises ValueError where it cannot."""
        shrinking = next((part for part in self.compression.parts if SELECTORS[part.select].shrinks), None)
        if shrinking is None:
            return
        if self.kind != "plain":
            raise ValueError(
                f"{shrinking.name} shrinks pictures that a vision tower of one size sees as one, and a"
                f" {self.name} takes them in parts or at their own size; make the picture smaller before the"
                " processor"
            )
        side = patches_across(self.body.config.vision_config)
        self.shrunk = Shrunk.of(self.compression, self.decoder.config.num_hidden_layers, side)

    def _layers(self) -> list[torch.nn.Module]:
        lists = [module for module in self.tower.modules() if isinstance(module, torch.nn.ModuleList)]
        layers = [list(one) for one in lists if attention_modules(one)]
        if not layers:
            raise ValueError(
                f"{self.compression.name} needs what the vision tower says, and this {self.name} has none"
                " with layers of attention; choose a method that reads embeddings"
            )
        return max(layers, key=len)

    def open(self) -> None:
        """Look from now on."""
        if self.kind is not None and self.compression.compresses:
            if self.wants is None and BEFORE not in self.compression.layers:
                return
            for name in ("get_image_features", "get_video_features"):
                if hasattr(self.body, name):
                    vars(self.body)[name] = Features(self, name)

    def close(self) -> None:
        """Give the body back as it was."""
        for name in ("get_image_features", "get_video_features"):
            vars(self.body).pop(name, None)
        if self.kind is not None:
            for module in self.tower.modules():
                vars(module).pop(score.MARK, None)
                if hasattr(module, "config"):
                    score.disable(module.config)

    def look(self, name: str, own: Callable, args, kwargs):
        """Run the body's own function, and set what the tower said on what it returns."""
        if self.wants is None:
            listener = None
        else:
            listener = self._listener()
            for module in self.tower.modules():
                if hasattr(module, score.MARK):
                    score.enable(module.config)
        kwargs = {**dict(zip(inspect.signature(own).parameters, args)), **kwargs, "return_dict": True}
        if self.shrunk is not None:
            kwargs |= {
                "pixel_values": self.shrunk.pixels(kwargs["pixel_values"]),
                "interpolate_pos_encoding": True,
            }
        token = _LISTENER.set(listener)
        try:
            output = own(**kwargs)
        finally:
            _LISTENER.reset(token)
        if self.shrunk is not None:
            output.pooler_output = list(self.shrunk.spread(torch.stack(list(output.pooler_output))))
        arranger = ARRANGERS[self.kind](self.body, name, kwargs, output.pooler_output)
        looks = None if listener is None else self._looks(arranger, output, listener)
        object.__setattr__(output, LOOKS, Looked(arranger.lengths, looks))
        call = calls.at_layers(self.decoder)
        if call is not None:
            call.pictures["video" if "video" in name else "image"] = output
        return output

    def _looks(self, arranger: "Plain", output, listener: Listener) -> list[Look]:
        hidden = self._hidden(output, arranger.given)
        view = listener.view(hidden if hidden.ndim > 2 else hidden[None])
        if self.shrunk is not None:
            view = replace(view, hidden=self.shrunk.spread(view.hidden))
        if self.kind == "windows":  # one sequence stands for all pictures
            view = view.expand(len(arranger.lengths))
        grid = arranger.grid if "grid" in self.wants.fields else None
        return view.looks(arranger.counts, arranger, grid)

    def _hidden(self, output, given: dict) -> torch.Tensor:
        """The features in front of the projector, with the [CLS] token where there is one."""
        states = getattr(output, "hidden_states", None)
        layer = given.get("vision_feature_layer") or getattr(self.body.config, "vision_feature_layer", None)
        if states is None or layer is None:
            return output.last_hidden_state
        layers = [layer] if isinstance(layer, int) else layer
        return torch.cat([states[number] for number in layers], -1)

    # --- a call ---

    def seen(self, prefill: Prefill, ids: torch.Tensor | None, videos: list[int], outputs: dict) -> Prefill:
        """A call's prefill with what the tower said.

        ids: the call's (B, S); videos: the placeholder ids of videos; outputs: what the two functions
        returned for this call, by modality.
        """
        looked = {
            kind: getattr(output, LOOKS, None) for kind, output in outputs.items() if output is not None
        }
        if not looked or None in looked.values():
            return prefill
        visual = prefill.visual
        total = sum(sum(one.lengths) for one in looked.values())
        repeats = max(1, int(visual.sum()) // max(1, total))  # beams and returned sequences
        rows = self._rows(visual[::repeats].tolist(), None if ids is None else ids[::repeats], videos, looked)
        lengths = [[length for length, _ in row] for row in rows]
        if self.wants is None:
            return replace(prefill, seen=Seen(_NOTHING, lengths))
        looks = [[look for _, look in row] for row in rows]
        left, context = self._left(looks, visual.device), context_of(looks)
        if self.clip is not None and ids is not None and RELEVANCE in self.compression.needs:
            asked = self._asked(prefill, ids, repeats)
            context = self.clip.add_to(context, asked)
        return replace(prefill, seen=Seen(context, lengths, left))

    def _asked(self, prefill: Prefill, ids: torch.Tensor, repeats: int) -> list[Asked]:
        labels = prefill.labels
        answers = [None] * len(ids) if labels is None else (labels != IGNORE_INDEX).tolist()
        rows = list(zip(ids.tolist(), prefill.visual.tolist(), answers, strict=True))
        return [Asked.of(*row) for row in rows[::repeats]]

    def _rows(self, visual, ids, videos, looked) -> list[list[tuple[int, Look | None]]]:
        """The pictures of each row, in the order of its columns."""
        queues = {kind: iter(one.pairs()) for kind, one in looked.items()}
        only = next(iter(queues)) if len(queues) == 1 else None
        if only is None and ids is None:
            raise ValueError(
                "embeddings do not tell images from videos, which this method reads apart; give input_ids"
            )
        rows, film = [], set(videos)
        for b, columns in enumerate(visual):
            row, column = [], 0
            while True in columns[column:]:
                column = columns.index(True, column)
                kind = only or ("video" if int(ids[b, column]) in film else "image")
                row.append(next(queues[kind], None))
                if row[-1] is None:
                    raise ValueError("the prompt has more visual tokens than its pictures; give all pictures")
                left = row[-1][0]
                while left and column < len(columns):  # a video may have text between its frames
                    left -= columns[column]
                    column += 1
            rows.append(row)
        return rows

    def _left(self, rows: Sequence[Sequence[Look]], device):
        """What the tower's own compression leaves, where there is one."""
        schedule = self.compression.schedule(self.decoder.config.num_hidden_layers)
        step = next((step for step in schedule if step.part.at == TOWER), None)
        if step is None:
            return None
        shown = [one for row in rows for one in row]
        lefts = iter(compress_pictures(step, shown))
        found = [[(len(one), next(lefts)) for one in row] for row in rows]
        whole = left_of_rows(found, device)
        tokens = [self._projected(left) for row in found for _, left in row if left is not None]
        return replace(whole, tokens=_placed(found, tokens)) if tokens else whole

    def _projected(self, left: Left) -> torch.Tensor:
        """(T, D): what is left, through the model's own projector; newlines stay what they are."""
        tokens = self.body.multi_modal_projector(left.tokens[None])[0]
        newline = getattr(self.body, "image_newline", None)
        if newline is None:
            return tokens
        return torch.where(left.outside[:, None], newline.to(tokens), tokens)


@dataclass(frozen=True)
class Looked:
    """The visual tokens of each picture, and what the tower said of them, where it was asked."""

    lengths: list[int]
    looks: list[Look] | None

    def pairs(self) -> list[tuple[int, Look | None]]:
        return list(zip(self.lengths, self.looks or [None] * len(self.lengths)))


def _placed(rows, tokens: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each row the numbers, among its visual tokens, of those that a compression in the tower changed,
    and what they are now."""
    queue, found = iter(tokens), []
    like = tokens[0]
    for row in rows:
        first, places, values = 0, [], []
        for count, left in row:
            if left is not None:
                places.append(left.columns + first)
                values.append(next(queue))
            first += count
        empty = torch.zeros(0, dtype=torch.long, device=like.device)
        found.append((torch.cat(places) if places else empty, torch.cat(values) if values else like[:0]))
    return found


def _at_input(c: Compression, name: str) -> Compression:
    """A compression in the tower of a model whose projector joins patches: at the input. Raises ConfigError
    where it cannot be done there."""
    try:
        if c.steps is None:
            return replace(c, at=INPUT)
        steps = (replace(p, at=INPUT) if p.at == TOWER else p for p in c.steps)
        return replace(c, steps=tuple(steps), layers=None)
    except ConfigError as error:
        problem = f"at: a {name} joins patches after its vision tower, so that tower is input here; {error}"
        raise ConfigError(problem) from None


_NOTHING = context_of([])
