"""What a model of transformers is given for a question about a picture."""

from PIL import Image


def chat(processor, messages: list[dict], **options):
    """The inputs (a ``BatchFeature`` of one row) that ask for the answer to a conversation, by the model's
    chat template; ``messages`` and ``options`` as transformers' ``apply_chat_template`` takes them."""
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def place_marks(processor) -> list[str]:
    """What a processor takes for the place of a picture or a video, wherever it stands in a text."""
    marks = (getattr(processor, name, None) for name in ("image_token", "video_token"))
    return [mark for mark in marks if isinstance(mark, str)]


def image_question(processor, image: Image.Image, text: str):
    """The inputs (a ``BatchFeature``) for one question about a picture, by the model's chat template.

    Without a template the place of the picture comes before the text, unless the text has it.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        return chat(processor, [{"role": "user", "content": content}])
    if processor.image_token not in text:
        text = f"{processor.image_token}\n{text}"
    return processor(images=[image], text=[text], return_tensors="pt")
