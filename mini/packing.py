"""Many short texts of one image, packed into slots of one length after it."""

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from libra.mini.questions import Question
from llava.constants import IGNORE_INDEX

SLOTS, SLOT = 11, 26  # tokens a slot; a slot holds one to three texts
PREFIX = "USER :"  # stands before the image
EMPTY = -1


class Encoder:
    """A question with its answer as tokens: those after the image in LLaVA's prompt, and how many are the
    question's."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.encode = lru_cache(100_000)(self._encode)

    def __reduce__(self):
        return Encoder, (self.tokenizer,)

    def _encode(self, question: str, answer: str) -> tuple[list[int], int]:
        prompt = self.tokenizer(f"{question} ASSISTANT :", add_special_tokens=False).input_ids
        reply = self.tokenizer(answer, add_special_tokens=False).input_ids
        return [*prompt, *reply, self.tokenizer.eos_token_id], len(prompt)


@dataclass
class Slot:
    """The texts of one slot, one after the other, a list entry a token."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    text_ids: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    count: int = 0

    def add(self, text: list[int], prompt: int) -> None:
        length, answer = len(text) - 1, len(text) - prompt
        self.ids += text[:-1]
        self.labels += [IGNORE_INDEX] * (prompt - 1) + text[prompt:]
        # Long answers would have most of the loss: an answer counts with the root of its length.
        self.weights += [0.0] * (prompt - 1) + [answer**-0.5] * answer
        self.text_ids += [self.count] * length
        self.places += range(length)
        self.count += 1


def pack(
    encoder: Encoder, questions: list[Question]
) -> tuple[dict[str, torch.Tensor], list[tuple[int, int] | None]]:
    """Put each text into the first slot that has room; a text that no slot has room for is left out.

    Returns:
        ``input_ids``, ``labels`` (the next token where it belongs to an answer), ``text_ids`` (which text of
        its slot a token belongs to, or EMPTY), ``places`` (in the text) and ``weights`` (of the labels), each
        (SLOTS, SLOT); and for each question its slot and its number there, or None.
    """
    pad = encoder.tokenizer.pad_token_id
    slots, found = [Slot() for _ in range(SLOTS)], []
    for question, answer in questions:
        text, prompt = encoder.encode(question, answer)
        number = next((i for i, slot in enumerate(slots) if len(slot.ids) + len(text) - 1 <= SLOT), None)
        found.append(None if number is None else (number, slots[number].count))
        if number is not None:
            slots[number].add(text, prompt)
    columns = {
        "input_ids": [slot.ids + [pad] * (SLOT - len(slot.ids)) for slot in slots],
        "labels": [slot.labels + [IGNORE_INDEX] * (SLOT - len(slot.labels)) for slot in slots],
        "text_ids": [slot.text_ids + [EMPTY] * (SLOT - len(slot.text_ids)) for slot in slots],
        "places": [slot.places + [0] * (SLOT - len(slot.places)) for slot in slots],
        "weights": [slot.weights + [0.0] * (SLOT - len(slot.weights)) for slot in slots],
    }
    return {name: torch.tensor(rows) for name, rows in columns.items()}, found
