"""The text side of a llava-hf folder: a tokenizer that knows ``<image>``, and a prompt template in Jinja."""

import json
from string import Template

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from ..conversation import SeparatorStyle, conv_templates


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with a token for ``<image>``, which pads on the left, as generation needs it.

    The ids of a prompt are those of ``tokenizer_image_token``, so what follows an image is encoded like a
    text of its own.

    Args:
        tokenizer: of a LLaVA checkpoint, as loaded; it is used up.

    Raises:
        ValueError: if it has no form that can be saved as tokenizer.json.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(tokenizer).__name__
        raise ValueError(
            f"the tokenizer is a {kind}, which cannot be saved as tokenizer.json; use the checkpoint as it is"
        )
    starts = (
        isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace)
        and backend.pre_tokenizer.prepend_scheme != "never"
    )
    if backend.token_to_id(DEFAULT_IMAGE_TOKEN) is None:
        if starts:
            # SentencePiece puts a space in front of each text, this one only in front of the prompt: a
            # normaliser, which sees <image> where the token is a normalised one, puts it after the last
            # image.
            space = normalizers.Replace(
                Regex(rf"{DEFAULT_IMAGE_TOKEN}(?!{DEFAULT_IMAGE_TOKEN}|\z)"), DEFAULT_IMAGE_TOKEN + "▁"
            )
            backend.normalizer = (
                normalizers.Sequence([backend.normalizer, space]) if backend.normalizer else space
            )
        tokenizer.add_tokens(
            [AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=starts)], special_tokens=True
        )
    named = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    named.setdefault("pad_token", named.get("eos_token"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **named,
    )


_CHAT = Template("""\
{%- macro text(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content if part.type == "image" -%} {{- $image -}} {%- endfor -%}
{%- for part in content if part.type == "text" -%} {{- part.text -}} {%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- $head -}}
{%- for message in messages -%}
{%- if message.role == "user" -%}
{{- $user -}}
{%- elif message.role == "assistant" -%}
{{- $assistant -}}
{%- else -%}
{{- raise_exception("this template takes messages of user and assistant only: its system text is its own") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- $prompt -}} {%- endif -%}
""")


def chat_template(name: str, start_end: bool = False) -> str | None:
    """The Jinja template that gives the prompts of a conversation template; a turn's images stand in front of
    its text.

    Args:
        start_end: whether images stand between ``<im_start>`` and ``<im_end>``.

    Returns:
        None for plain templates, which are for training.
    """
    conversation = conv_templates[name]
    style, sep, text = conversation.sep_style, conversation.sep, "text(message.content)"
    if style is SeparatorStyle.PLAIN:
        return None
    image = (
        DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        if start_end
        else DEFAULT_IMAGE_TOKEN
    )
    if style is SeparatorStyle.LLAMA_2:
        system = f"<<SYS>>\n{conversation.system}\n<</SYS>>\n\n" if conversation.system else ""
        first, later = json.dumps("[INST] " + system), json.dumps(sep + "[INST] ")
        parts = {
            "head": '""',
            "prompt": '""',
            "user": f'({first} if loop.first else {later}) ~ {text} ~ " [/INST]"',
            "assistant": f'" " ~ {text} ~ {json.dumps(" " + conversation.sep2)}',
        }
    else:
        user, assistant = (
            role if style is SeparatorStyle.MPT else f"{role}: " for role in conversation.roles
        )
        end = conversation.sep2 if style is SeparatorStyle.TWO else sep
        parts = {
            "head": json.dumps(conversation.get_prompt()),
            "prompt": json.dumps(assistant.rstrip(" ")),
            "user": f"{json.dumps(user)} ~ {text} ~ {json.dumps(sep)}",
            "assistant": f"{json.dumps(assistant)} ~ {text} ~ {json.dumps(end)}",
        }
    return _CHAT.substitute(parts, image=json.dumps(image + "\n"))
