"""How relevant each visual token is for the question, by the CLIP that the vision tower is a part of.

A token's embedding is CLIP's visual projection of the layer-normalised feature that the model takes from
the tower; the question's are those of its segments, as many as CLIP's text tower needs to read it. What
counts as the question is the text after the last picture up to an answer, without the name of the next role;
where nothing is left of it, the text before the first picture.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoTokenizer, CLIPModel
from transformers.utils import logging

from ..methods import Context
from ..utils.sentences import first_line

_ROLE = re.compile(r"\s*(?:assistant\s*:?|\[/INST\])\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """Token ids of one row's prompt around its pictures: before the first one, and after the last one up to
    an answer."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(
        cls, ids: Sequence[int], visual: Sequence[bool], answered: Sequence[bool] | None = None
    ) -> "Asked":
        """Of a row's ids, which of them are places of visual tokens, and which are answers."""
        places = [column for column, there in enumerate(visual) if there]
        if not places:
            return cls(tuple(ids), ())
        end = len(ids)
        if answered is not None:
            end = next((i for i in range(places[-1] + 1, end) if answered[i]), end)
        return cls(tuple(ids[: places[0]]), tuple(ids[places[-1] + 1 : end]))


class ClipRelevance:
    """CLIP's text tower and projections, and the tokenizer of the language model, whose ids are to be read.

    Made by :meth:`load`; called with features of the tower it returns :attr:`libra.Context.relevance`.
    """

    def __init__(self, clip: CLIPModel, clip_tokenizer, decode: Callable[[Sequence[int]], str]):
        self.clip, self.clip_tokenizer, self.decode = clip, clip_tokenizer, decode

    @classmethod
    def load(cls, checkpoint: str | Path, tokenizer) -> "ClipRelevance":
        """Read a whole CLIP from its folder or hub name.

        tokenizer: the language model's, with a ``decode`` for token ids.

        Raises:
            ValueError: where there is no whole CLIP.
        """
        name = str(checkpoint)
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            config = AutoConfig.from_pretrained(name)
            if config.model_type != "clip":
                raise ValueError(f"it is of type {config.model_type!r}")
            clip: CLIPModel
            info: dict
            clip, info = CLIPModel.from_pretrained(  # type: ignore[misc]  # two with output_loading_info
                name, dtype=torch.float32, output_loading_info=True
            )
            if info["missing_keys"]:
                raise ValueError(f"{sorted(info['missing_keys'])[0]} is missing")
            read = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(f"{name} is not a whole CLIP: {first_line(error)}") from error
        finally:
            logging.set_verbosity(before)
        # Its picture tower is the model's own, or the like; only what comes after it is needed.
        clip.vision_model.encoder = torch.nn.Identity()
        clip.vision_model.embeddings = torch.nn.Identity()

        def decode(ids: Sequence[int]) -> str:
            return tokenizer.decode(list(ids), skip_special_tokens=True)

        return cls(clip.eval().requires_grad_(False), read, decode)

    def __deepcopy__(self, memo) -> "ClipRelevance":
        return copy.copy(self)  # its weights never change

    @property
    def width(self) -> int:
        """Of the tower's features."""
        return self.clip.config.vision_config.hidden_size

    def question(self, asked: Asked) -> str:
        """What is compared, as text."""
        return _ROLE.sub("", self.decode(asked.after)).strip() or self.decode(asked.before).strip()

    def segments(self, text: str) -> torch.Tensor:
        """(M, L): ids of the segments of a text, each with CLIP's start and end, padded."""
        sizes, tokenizer = self.clip.config.text_config, self.clip_tokenizer
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        room = sizes.max_position_embeddings - 2
        pieces = [ids[start : start + room] for start in range(0, max(1, len(ids)), room)]
        length = 2 + max(map(len, pieces))
        rows = [[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id] for piece in pieces]
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    @torch.no_grad()
    def __call__(self, features: torch.Tensor, asked: Sequence[Asked]) -> torch.Tensor:
        """(B, N) float32, from features (B, N, C) of the tower and the B rows' prompts: the mean cosine of a
        token's embedding with those of the question's segments."""
        if self.clip.device != features.device:
            self.clip.to(features.device)  # type: ignore[arg-type]  # transformers wraps torch's
        with torch.autocast(features.device.type, enabled=False):
            seen = self.clip.visual_projection(self.clip.vision_model.post_layernorm(features.float()))
            found = []
            for row, one in zip(F.normalize(seen, dim=-1), asked, strict=True):
                ids = self.segments(self.question(one)).to(features.device)
                read = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
                found.append((row @ F.normalize(read, dim=-1).transpose(0, 1)).mean(1))
        return torch.stack(found)

    def add_to(self, context: Context, asked: Sequence[Asked]) -> Context:
        """A context with the relevance of its tokens."""
        if context.tower_hidden is None:
            return context
        return replace(context, relevance=self(context.tower_hidden, asked))
