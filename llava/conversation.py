"""Conversations and the templates that turn them into prompts; names and texts are those of the published
LLaVA projects."""

from dataclasses import dataclass, field, replace
from enum import Enum, auto

from .constants import DEFAULT_IMAGE_TOKEN


class SeparatorStyle(Enum):
    """How turns are joined: one separator, two in turn, ChatML-like, bare text, or Llama 2's brackets."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


@dataclass
class Conversation:
    """A template with the messages so far.

    Attributes:
        system: text in front of everything; may be empty.
        roles: names of the user and of the model.
        messages: [role, text] in order. The text is None where the model is to answer; a tuple (text, image,
            mode) in demos.
        offset: how many of the first messages are examples that belong to the template.
        sep, sep2: what ends a turn; ``sep2`` ends the model's turns in the styles TWO, PLAIN and LLAMA_2.
        version: decides how ``llava.train`` masks the labels.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list] = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    @property
    def stop(self) -> str:
        """What the model writes when its turn is over."""
        return self.sep2 if self.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2) else self.sep

    def append_message(self, role: str, message: str | tuple | None) -> None:
        self.messages.append([role, message])

    def copy(self) -> "Conversation":
        """A conversation of its own; images in messages are shared."""
        return replace(self, roles=tuple(self.roles), messages=[list(message) for message in self.messages])

    def dict(self) -> dict:
        """Plain values, images left out."""
        texts = [
            [role, message[0] if isinstance(message, tuple) else message] for role, message in self.messages
        ]
        kept = {name: getattr(self, name) for name in ("system", "roles", "offset", "sep", "sep2")}
        return {**kept, "messages": texts}

    def get_prompt(self) -> str:
        """The whole conversation as one text.

        Raises:
            ValueError: for an answered turn in a PLAIN template, which says how a caption ends only in
                training.
        """
        return getattr(self, f"_{self.sep_style.name.lower()}")(self._texts())

    def _texts(self) -> list[tuple[str, str | None]]:
        """The messages as text. An image that came with the first one stands in front, or in a turn of its
        own (``mmtag``)."""
        texts = [
            (role, message[0] if isinstance(message, tuple) else message) for role, message in self.messages
        ]
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return texts
        role, first = texts[0]
        first = first.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" in self.version:
            received = [
                (self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"),
                (self.roles[1], "Received."),
            ]
            return [*received, (role, first), *texts[1:]]
        return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{first}"), *texts[1:]]

    def _single(self, texts) -> str:
        return self._named_turns(texts, (self.sep, self.sep))

    def _two(self, texts) -> str:
        return self._named_turns(texts, (self.sep, self.sep2))

    def _named_turns(self, texts, ends) -> str:
        turns = [
            f"{role}: {text}{ends[i % 2]}" if text else f"{role}:" for i, (role, text) in enumerate(texts)
        ]
        return "".join([self.system + self.sep if self.system else "", *turns])

    def _mpt(self, texts) -> str:
        return (
            self.system
            + self.sep
            + "".join(f"{role}{text}{self.sep}" if text else role for role, text in texts)
        )

    def _plain(self, texts) -> str:
        ends = (self.sep, self.sep2)
        if self.sep2 is None and any(text for _, text in texts[1::2]):
            raise ValueError(
                "a plain template has no end for an answered turn; use a chat template such as 'vicuna_v1'"
            )
        return self.system + "".join(
            f"{text}{ends[i % 2]}" if text else "" for i, (_, text) in enumerate(texts)
        )

    def _llama_2(self, texts) -> str:
        system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
        prompt = ""
        for i, (_, text) in enumerate(texts):
            if text and i % 2 == 0:
                prompt += f"{self.sep}[INST] {system if i == 0 else ''}{text} [/INST]"
            elif text:
                prompt += f" {text} {self.sep2}"
        return prompt.removeprefix(self.sep)


def _polite(person: str) -> str:
    return (
        f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    )


_SEES = (
    "able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_VISION = f"You are a helpful language and vision assistant. You are {_SEES}"
# The missing space after the full stop is the published prompt's.
_MMTAG = (
    f"A chat between a curious user and an artificial intelligence assistant. The assistant is {_SEES}"
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while "
    "being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, "
    "or illegal content. Please ensure that your responses are socially unbiased and positive in "
    "nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't share false "
    "information."
)
_EXAMPLE_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_EXAMPLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of "
    "time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other "
    "hand, are finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some "
    "key differences between renewable and non-renewable energy sources:\n1. Availability: Renewable energy "
    "sources are virtually inexhaustible, while non-renewable energy sources are finite and will eventually "
    "run out.\n2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and "
    "other negative effects.\n3. Cost: Renewable energy sources can be more expensive to initially set up, "
    "but they typically have lower operational costs than non-renewable sources.\n4. Reliability: Renewable "
    "energy sources are often more reliable and can be used in more remote locations than non-renewable "
    "sources.\n5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n6. "
    "Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
    "sources are not, and their depletion can lead to economic and social instability.\n"
)

_HUMAN, _USER = ("Human", "Assistant"), ("USER", "ASSISTANT")
_CHATML_ROLES = ("<|im_start|>user\n", "<|im_start|>assistant\n")


def _two(system: str, version: str = "v1") -> Conversation:
    return Conversation(system, _USER, sep_style=SeparatorStyle.TWO, sep=" ", sep2="</s>", version=version)


def _chatml(system: str) -> Conversation:
    return Conversation(
        f"<|im_start|>system\n{system}",
        _CHATML_ROLES,
        sep_style=SeparatorStyle.MPT,
        sep="<|im_end|>",
        version="mpt",
    )


def _llama_2(system: str, sep: str = "<s>") -> Conversation:
    return Conversation(
        system, _USER, sep_style=SeparatorStyle.LLAMA_2, sep=sep, sep2="</s>", version="llama_v2"
    )


_V0 = Conversation(
    _polite("human"), _HUMAN, [["Human", _EXAMPLE_QUESTION], ["Assistant", _EXAMPLE_ANSWER]], offset=2
)
_PLAIN = Conversation("", ("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n")
_V1 = _two(_polite("user"))
_DIRECT = _chatml("Answer the questions.")

default_conversation = _V1
conv_templates: dict[str, Conversation] = {
    "default": _V0,
    "v0": _V0,
    "v1": _V1,
    "vicuna_v1": _V1,
    "llama_2": _llama_2(_LLAMA_2),
    "mistral_instruct": _llama_2("", sep=""),
    "chatml_direct": _DIRECT,
    "mistral_direct": _DIRECT,
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_v0": Conversation(_polite("human"), _HUMAN),
    "v0_mmtag": Conversation(_MMTAG, _HUMAN, version="v0_mmtag"),
    "llava_v1": _two(_polite("human")),
    "v1_mmtag": _two(_MMTAG, version="v1_mmtag"),
    "llava_llama_2": _llama_2(_VISION),
    "llava_llama_3": Conversation(
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{_VISION}",
        ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        sep_style=SeparatorStyle.MPT,
        sep="<|eot_id|>",
        version="llama3",
    ),
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest"
        " answers."
    ),
    "mini": _two(""),  # the embedded model's
}

# Tried in this order on a checkpoint's name.
_BY_NAME = (
    ("llama-2", "llava_llama_2"),
    ("llama-3", "llava_llama_3"),
    ("llama3", "llava_llama_3"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)


def conversation_name(model_name: str, config=None, explicit: str | None = None) -> str:
    """The template for a checkpoint: ``explicit``, else the key ``conversation`` of its config, else inferred
    from its name.

    Raises:
        ValueError: if a name that was given is not in ``conv_templates``.
    """
    given = explicit or getattr(config, "conversation", None)
    if given is None:
        return next((template for part, template in _BY_NAME if part in model_name.lower()), "llava_v0")
    if given not in conv_templates:
        raise ValueError(
            f"there is no conversation template {given!r}; use one of {', '.join(conv_templates)}"
        )
    return given
