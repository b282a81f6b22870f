"""A conversation to token ids, and labels at its answers, as the published LLaVA projects make them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from ..constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from ..conversation import Conversation, SeparatorStyle, conv_templates
from ..mm_utils import _encode, tokenizer_image_token
from ..video import DEFAULT_VIDEO_TOKEN, prompt_ids

CHAT = "chat"  # the version that stands for the tokenizer's own chat template (VideoLLaMA-2)
Turn = tuple[str, str]  # "human" or "gpt", and the text


@dataclass
class Encoded:
    """``input_ids`` and ``labels`` (S,), the latter -100 where nothing is supervised."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    mismatch: bool = False  # the rounds' tokens do not add up to the whole's: then nothing is supervised
    cut: bool = False  # at the limit


def training_template(version: str) -> Conversation | None:
    """The template of a ``--version``; None for "chat".

    Raises:
        ValueError: for an unknown name, or a template whose answers have no end (###).
    """
    if version == CHAT:
        return None
    known = [
        name for name, template in conv_templates.items() if template.sep_style is not SeparatorStyle.SINGLE
    ]
    if version not in known:
        raise ValueError(f"there is no training version {version!r}; use one of {', '.join([*known, CHAT])}")
    return conv_templates[version]


def place_images(
    turns: list[Turn], template: Conversation | None, several: bool, start_end: bool
) -> list[Turn]:
    """Turns with their ``<image>`` or ``<video>`` where training wants it.

    It goes to the front of its turn, and several in a turn become one; ``several`` (a sample with a list of
    images) leaves each where it stands. ``start_end`` puts ``<im_start>`` and ``<im_end>`` around it.
    """
    placed = []
    for speaker, text in turns:
        for token in (DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN):
            if token in text and not several:
                text = f"{token}\n{text.replace(token, '').strip()}".strip()
        if template is not None and "mmtag" in template.version:
            text = text.replace(DEFAULT_IMAGE_TOKEN, f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>")
        if start_end:
            text = text.replace(
                DEFAULT_IMAGE_TOKEN, f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}"
            )
        placed.append((speaker, text))
    return placed


def encode(
    turns: list[Turn], template: Conversation | None, tokenizer, has_image: bool, limit: int
) -> Encoded:
    """Ids and labels of a conversation: an answer is supervised with what ends it.

    Args:
        turns: by human and gpt in turn; a first one of gpt is left out.
        template: what :func:`training_template` returned.
        has_image: whether ``<image>`` stands for an image; otherwise it is text.
        limit: the tokenizer's ``model_max_length``; text without images is cut there.

    The published code finds the answers by tokenizing each round by itself, and gives up a sample whose
    rounds do not add up to the whole. So does this, token for token.
    """
    if turns[0][0] != "human":
        turns = turns[1:]
    if template is None:
        return _encode_chat(turns, tokenizer)
    ids_of = partial(tokenizer_image_token, tokenizer=tokenizer) if has_image else partial(_encode, tokenizer)
    if template.sep_style is SeparatorStyle.PLAIN:
        ids = ids_of(DEFAULT_IMAGE_TOKEN + turns[1][1] + template.sep)
        return _labelled(ids, [(len(ids_of(DEFAULT_IMAGE_TOKEN)), len(ids))])
    conversation = template.copy()
    conversation.messages = [[template.roles[speaker == "gpt"], text] for speaker, text in turns]
    prompt = conversation.get_prompt()
    whole = ids_of(prompt)
    ids = whole if has_image else whole[:limit]
    answers, end = _answers(prompt, template, tokenizer, lambda text: len(ids_of(text)))
    if end < limit and end != len(ids):
        return Encoded(torch.tensor(ids), torch.full((len(ids),), IGNORE_INDEX), mismatch=True)
    return _labelled(ids, answers, cut=len(ids) < len(whole))


def _labelled(ids: list[int], answers: list[tuple[int, int]], cut: bool = False) -> Encoded:
    ids = torch.tensor(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for start, stop in answers:
        labels[start:stop] = ids[start:stop]
    return Encoded(ids, labels, cut=cut)


def _answers(
    prompt: str, template: Conversation, tokenizer, length_of: Callable[[str], int]
) -> tuple[list[tuple[int, int]], int]:
    """The columns (from, to) of each answer, and the column after the last round, counted round by round."""
    legacy = getattr(tokenizer, "legacy", None)
    if template.sep_style is SeparatorStyle.MPT:
        return _sum_up(
            _pairs_of_turns(prompt, template.sep),
            template.sep + template.roles[1],
            0,
            *(
                (length_of, length_of, 1, -1)
                if template.version == "llama3"
                else (length_of, lambda head: length_of(head) - 1, 0, int(bool(legacy)))
            ),
        )
    two = template.sep_style is SeparatorStyle.TWO
    mark = f"{template.sep}{template.roles[1]}: " if two else "[/INST] "
    # A later round stands after </s>, where some tokenizers put no space in front of it, as they do when it
    # stands by itself.
    later = -1 if two and legacy is False else 0
    # The bos that each round gets stands for the </s> that it lost; the mark's space belongs to the answer.
    return _sum_up(
        prompt.split(template.sep2), mark, 1, length_of, lambda head: length_of(head.rstrip()) - 1, 0, later
    )


def _pairs_of_turns(prompt: str, sep: str) -> list[str]:
    """The system text with the first question and answer, then each further question with its answer."""
    turns = prompt.split(sep)
    cuts = [0, *range(3, len(turns), 2), len(turns)]
    return [sep.join(turns[start:stop]) for start, stop in pairwise(cuts)]


def _sum_up(
    rounds, mark: str, start: int, length_of, head_of, extra: int, later: int
) -> tuple[list[tuple[int, int]], int]:
    """Columns of the answers, round by round; ``extra`` tokens end each round and ``later`` correct all but
    the first."""
    answers, end = [], start
    for i, text in enumerate(rounds):
        parts = text.split(mark)
        if len(parts) != 2:
            break
        correction = later if i else 0
        length, head = length_of(text) + extra + correction, head_of(parts[0] + mark) + correction
        answers.append((end + head, end + length))
        end += length
    return answers, end


def _encode_chat(turns: list[Turn], tokenizer) -> Encoded:
    """By the tokenizer's chat template, as VideoLLaMA-2 does: an answer is what its turn adds to the prompt
    before it."""
    said = [
        {"role": "user" if speaker == "human" else "assistant", "content": text} for speaker, text in turns
    ]

    def ids_of(messages, prompting=False) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompting)
        return prompt_ids(text, tokenizer)

    answers = [(len(ids_of(said[:i], True)), len(ids_of(said[: i + 1]))) for i in range(1, len(said), 2)]
    return _labelled(ids_of(said), answers)
