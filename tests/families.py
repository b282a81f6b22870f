"""A tiny random model of every family that libra.attach supports, batches for it (text, images and videos in
any order), and
the same computation by hand: one sample, no cache, no padding, around the layers of a twin with eager
attention."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import plain
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from libra import Compression

VOCABULARY = 100
IMAGE, VIDEO, START, END = 90, 91, 92, 93
WIDE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=6,
    max_position_embeddings=512,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
CLIP = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=7,
    projection_dim=16,
    initializer_range=0.2,
)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Picture:
    """One image or video: its placeholder tokens, as they stand in a prompt, and the arguments it adds to a
    batch."""

    ids: list[int]
    given: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """How to make a model of a family and its pictures; ``video`` is None where the family takes only images,
    ``marks`` gives the arguments that are made of the token ids (B, S), ``join`` makes one tensor of an
    argument's tensors of each picture."""

    config: Callable[[str], object]
    image: Callable[[torch.Generator], Picture]
    video: Callable[[torch.Generator], Picture] | None = None
    texts: tuple[str, ...] = ("llama",)
    marks: Callable[[torch.Tensor], dict[str, torch.Tensor]] = lambda ids: {}
    join: Callable[[str, list[torch.Tensor]], torch.Tensor] = lambda name, parts: torch.cat(parts)


def text_config(name: str, **changes):
    classes = {
        "llama": "LlamaConfig",
        "mistral": "MistralConfig",
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
    }
    extra = {"mistral": dict(sliding_window=None), "qwen3": dict(head_dim=8)}.get(name, {})
    return getattr(transformers, classes[name])(**{**WIDE, **extra, **changes})


def noise(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=draw)


def llava(text):
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=text_config(text),
        image_token_id=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def llava_image(draw):
    return Picture([IMAGE] * 16, {"pixel_values": noise(draw, 1, 3, 28, 28)})


def llava_next(text):
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=text_config(text),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def llava_next_image(draw):
    """A wide image of two tiles: the overview's 16 tokens, then four rows of eight, with a newline each."""
    return Picture(
        [IMAGE] * (16 + 4 * (8 + 1)),
        {"pixel_values": noise(draw, 1, 3, 3, 28, 28), "image_sizes": torch.tensor([[28, 56]])},
    )


def llava_onevision(text):
    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        vision_use_head=False,
    )
    return transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text_config(text),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[28, 28], [28, 56]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def llava_onevision_image(draw):
    return Picture(
        [IMAGE] * (16 + 4 * (4 + 1)),
        {"pixel_values": noise(draw, 1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])},
    )


def llava_onevision_video(draw):
    """Three frames, pooled to 2 x 2 each, and a newline."""
    return Picture([VIDEO] * (3 * 4 + 1), {"pixel_values_videos": noise(draw, 1, 3, 3, 28, 28)})


def video_llava(text):
    return transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=text_config(text),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def video_llava_image(draw):
    return Picture([IMAGE] * 16, {"pixel_values_images": noise(draw, 1, 3, 28, 28)})


def video_llava_video(draw):
    return Picture([VIDEO] * (8 * 17), {"pixel_values_videos": noise(draw, 1, 8, 3, 28, 28)})


def internvl(text):
    vision = transformers.InternVLVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[56, 56],
        patch_size=[7, 7],
        initializer_range=0.2,
    )
    return transformers.InternVLConfig(
        vision_config=vision,
        text_config=text_config(text),
        image_token_id=IMAGE,
        image_seq_length=16,
    )


def internvl_image(draw):
    """Two tiles: a run of tokens each, with text between them, as its processor writes them for several
    images."""
    return Picture([IMAGE] * 16, {"pixel_values": noise(draw, 1, 3, 56, 56)})


QWEN_IDS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)


def qwen2_vl(_):
    return transformers.Qwen2VLConfig(
        text_config={**WIDE, "rope_parameters": MROPE},
        vision_config=dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4),
        **QWEN_IDS,
    )


def qwen2_5_vl(_):
    return transformers.Qwen2_5_VLConfig(
        text_config={**WIDE, "rope_parameters": MROPE},
        vision_config=dict(
            depth=2,
            hidden_size=16,
            intermediate_size=32,
            num_heads=2,
            patch_size=4,
            out_hidden_size=32,
            window_size=16,
            fullatt_block_indexes=[1],
            tokens_per_second=2,
        ),
        **QWEN_IDS,
    )


def qwen3_vl(_):
    return transformers.Qwen3VLConfig(
        text_config={**WIDE, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config=dict(
            depth=3,
            hidden_size=16,
            intermediate_size=32,
            num_heads=2,
            patch_size=4,
            out_hidden_size=32,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        **QWEN_IDS,
    )


def qwen_image(draw):
    """4 x 6 merged patches between the marks of start and end, which are text."""
    return Picture(
        [START, *[IMAGE] * 24, END],
        {"pixel_values": noise(draw, 8 * 12, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 8, 12]])},
    )


def qwen_video(draw):
    """Two steps in time of 2 x 4 merged patches."""
    return Picture(
        [START, *[VIDEO] * 16, END],
        {
            "pixel_values_videos": noise(draw, 2 * 4 * 8, 3 * 2 * 4 * 4),
            "video_grid_thw": torch.tensor([[2, 4, 8]]),
        },
    )


def qwen3_video(draw):
    """The same, each step by itself after the text of its time."""
    return Picture(
        [10, 11, START, *[VIDEO] * 8, END, 10, 12, START, *[VIDEO] * 8, END], qwen_video(draw).given
    )


def modalities(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which token is text (0), of an image (1), of a video (2): what their processor gives."""
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


KINDS = {
    "LlavaForConditionalGeneration": Kind(llava, llava_image, texts=("llama", "mistral", "qwen2")),
    "LlavaNextForConditionalGeneration": Kind(llava_next, llava_next_image, texts=("llama", "mistral")),
    "LlavaOnevisionForConditionalGeneration": Kind(
        llava_onevision, llava_onevision_image, llava_onevision_video, texts=("qwen2",)
    ),
    "VideoLlavaForConditionalGeneration": Kind(video_llava, video_llava_image, video_llava_video),
    "InternVLForConditionalGeneration": Kind(internvl, internvl_image, texts=("qwen2", "qwen3", "llama")),
    "Qwen2VLForConditionalGeneration": Kind(
        qwen2_vl, qwen_image, qwen_video, texts=("own",), marks=modalities
    ),
    "Qwen2_5_VLForConditionalGeneration": Kind(
        qwen2_5_vl, qwen_image, qwen_video, texts=("own",), marks=modalities
    ),
    "Qwen3VLForConditionalGeneration": Kind(
        qwen3_vl, qwen_image, qwen3_video, texts=("own",), marks=modalities
    ),
}


EVERY = [
    (family, text) for family, kind in KINDS.items() for text in kind.texts
]  # with each of its text decoders
SAID = dict(do_sample=False, suppress_tokens=[IMAGE, VIDEO, START, END])  # greedy, and never a placeholder


def own_model(family: str, text: str = "", attention: str = "sdpa", seed: int = 0, **sizes):
    """:func:`make` for one of ``KINDS``."""
    return make(KINDS[family], family, text, attention, seed, **sizes)


def make(kind: Kind, family: str, text: str = "", attention: str = "sdpa", seed: int = 0, **sizes):
    """A model of random weights, larger than usual ones so that attention is far from uniform; ``sizes`` of
    its decoder."""
    torch.manual_seed(seed)
    config = kind.config(text or kind.texts[0])
    for name, value in sizes.items():
        setattr(config.text_config, name, value)
    made = getattr(transformers, family)._from_config(config, attn_implementation=attention).eval()
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            parameter.data.normal_(0, 0.2)
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = 0, None
    return made


model = cache(own_model)  # shared: leave it as it is


@dataclass(frozen=True)
class Talk:
    """One sample: ids (S,), labels (S,) with -100 outside the answers, and what its pictures add to a
    batch."""

    ids: torch.Tensor
    labels: torch.Tensor
    given: list[dict[str, torch.Tensor]]

    @property
    def visual(self) -> torch.Tensor:
        return (self.ids == IMAGE) | (self.ids == VIDEO)


def talk(family: str, pattern: str, seed: int) -> Talk:
    """:func:`talk_of` for one of ``KINDS``."""
    return talk_of(KINDS[family], pattern, seed)


def talk_of(kind: Kind, pattern: str, seed: int) -> Talk:
    """From a pattern such as "t4 i t5 v t2 a3": text, an image, a video (an image where the family has none),
    an answer."""
    draw = torch.Generator().manual_seed(seed)
    ids, labels, given = [], [], []
    for part in pattern.split():
        if part[0] in "iv":
            picture = (kind.video if part[0] == "v" and kind.video else kind.image)(draw)
            ids.append(torch.tensor(picture.ids))
            given.append(picture.given)
        else:
            ids.append(torch.randint(3, IMAGE, (int(part[1:]),), generator=draw))
        labels.append(ids[-1] if part[0] == "a" else torch.full_like(ids[-1], -100))
    return Talk(torch.cat(ids), torch.cat(labels), given)


def collate(
    family: str, talks: list[Talk], side: str = "left", labels: bool = False
) -> dict[str, torch.Tensor]:
    """:func:`batch_of` for one of ``KINDS``."""
    return batch_of(KINDS[family], talks, side, labels)


def batch_of(
    kind: Kind, talks: list[Talk], side: str = "left", labels: bool = False
) -> dict[str, torch.Tensor]:
    """The model's arguments for a batch."""

    def padded(parts, value):
        return pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)

    ids = padded([t.ids for t in talks], 0)
    batch = {"input_ids": ids, "attention_mask": padded([torch.ones_like(t.ids) for t in talks], 0)}
    for name in sorted({name for t in talks for picture in t.given for name in picture}):
        batch[name] = kind.join(name, [p[name] for t in talks for p in t.given if name in p])
    batch.update(kind.marks(ids))
    if labels:
        batch["labels"] = padded([t.labels for t in talks], -100)
    return batch


# --- by hand ---


class Seen(Exception):
    """Leaves a model whose decoder's arguments are known."""


def decoder_arguments(model, given: dict) -> dict:
    """What a model hands to its decoder: embeddings with the images in them, positions, Qwen3-VL's deeper
    features."""
    seen = []

    def spy(module, args, kwargs):
        seen.append(kwargs)
        raise Seen

    hook = model.model.language_model.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        model(**given)
    except Seen:
        return seen[0]
    finally:
        hook.remove()


def sample_key(ids: torch.Tensor, visual: torch.Tensor) -> int:
    """What select: random draws from: the text of a call, each id times its place."""
    return int((ids * torch.arange(1, len(ids) + 1))[~visual].sum())


def window_of(config, layer: int) -> int | None:
    """How many columns back a layer sees, itself included; None for all."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return getattr(config, "sliding_window", None) if kinds[layer] == "sliding_attention" else None


def by_hand(
    twin,
    family: str,
    t: Talk,
    c: Compression,
    said=(),
    scorers: list[int] | None = None,
    starts: tuple[int, ...] = (0,),
) -> plain.Outcome:
    """A sample with the ids ``said`` after it, compressed as ``plain`` reads it; ``twin`` has eager
    attention.

    It comes in turns that begin at the columns ``starts``; the last column of a turn scores its visual
    tokens, unless ``scorers`` has one for each run of them. A layer's window counts the columns that are
    left; everything else about a layer is its own business.
    """
    longer = Talk(torch.cat([t.ids, torch.tensor(list(said), dtype=torch.long)]), t.labels, t.given)
    given = decoder_arguments(twin, collate(family, [longer]))
    decoder, hidden, positions = twin.model.language_model, given["inputs_embeds"], given["position_ids"]
    if positions is None:
        positions = torch.arange(hidden.shape[1]).expand(*([3] if family.startswith("Qwen") else []), 1, -1)
    positions = positions[-3:] if positions.ndim == 3 else positions
    deep = given.get("deepstack_visual_embeds") or []
    prefills = []
    for start, end in zip(starts, (*starts[1:], len(t.ids))):
        visual, scorer = t.visual[start:end], end - 1 if scorers is None else scorers
        prefills.append(plain.Prefill.of(visual, scorer, c, start, sample_key(t.ids[start:end], visual)))
    source = list(range(hidden.shape[1]))

    def run(i: int, hidden, positions):
        """Layer i on (1, S, D), and its attention (S, S)."""
        layer, heads = decoder.layers[i], []
        hook = layer.self_attn.register_forward_hook(lambda module, args, output: heads.append(output[1]))
        place, window = torch.arange(hidden.shape[1]), window_of(decoder.config, i)
        unseen = place[None] > place[:, None]
        if window is not None:
            unseen = unseen | (place[None] <= place[:, None] - window)
        mask = torch.zeros(unseen.shape).masked_fill(unseen, -torch.inf)[None, None]
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_embeddings=decoder.rotary_emb(hidden, positions),
            position_ids=None,
        )
        hook.remove()
        return hidden, heads[0][0].mean(0).detach()

    for i in range(len(decoder.layers)):
        hidden, alpha = run(i, hidden, positions)
        if i < len(deep):
            hidden = hidden.index_put(
                (given["visual_pos_masks"],), hidden[given["visual_pos_masks"]] + deep[i]
            )
        if i in c.layers:
            for turn in range(len(prefills)):
                if c.score_layer == "next":
                    alpha = run(i + 1, hidden, positions)[1]
                matrix, kept, prefills = plain.shorten(hidden[0].detach(), alpha, c, prefills, turn)
                old = [j for j, _ in kept]
                hidden, alpha = (matrix @ hidden[0])[None], alpha[old][:, old]
                source = [None if extra else source[j] for j, extra in kept]
                positions = torch.arange(len(kept))[None] if c.positions == "compact" else positions[..., old]
    return plain.Outcome(twin.lm_head(decoder.norm(hidden))[0], source)
