"""Classes that libra.attach refuses, without weights, and the reason that it gives."""

import torch
import transformers
from packaging.version import Version

from .sizes import recipe

ENCODER = "its images go to an encoder, not into the decoder's sequence"
CROSS = "its text looks at the images through cross-attention, so its layers have no visual tokens"
PLACEHOLDER = "its configuration names no placeholder of visual tokens"
WITHIN = "its generate hands embeddings to its language model, which knows of no placeholders"
INDICES = "its decoder layers take prev_topk_indices, which nobody can shorten"
NUMBER = "the configuration of its decoder does not tell how many layers it has"
REASONS = {
    "Blip2ForConditionalGeneration": WITHIN,
    "BlipForConditionalGeneration": PLACEHOLDER,
    "DiffusionGemmaForBlockDiffusion": NUMBER,
    "Dots3NoteForConditionalGeneration": "its decoder has layers of type indexed_attention",
    "EvollaForProteinText2Text": PLACEHOLDER,
    "Florence2ForConditionalGeneration": ENCODER,
    "GitForCausalLM": PLACEHOLDER,
    "Glm5NextForConditionalGeneration": INDICES,
    "IdeficsForVisionText2Text": PLACEHOLDER,
    "Inkling2ForConditionalGeneration": "its decoder layers take block_states",
    "InstructBlipForConditionalGeneration": WITHIN,
    "InstructBlipVideoForConditionalGeneration": WITHIN,
    "Kosmos2ForConditionalGeneration": PLACEHOLDER,
    "Kosmos2_5ForConditionalGeneration": PLACEHOLDER,
    "Mistral4ForCausalLM": PLACEHOLDER,
    "MistralLarge4ForConditionalGeneration": INDICES,
    "MllamaForConditionalGeneration": CROSS,
    "PI0ForConditionalGeneration": PLACEHOLDER,
    "PPFormulaNetForConditionalGeneration": PLACEHOLDER,
    "Pix2StructForConditionalGeneration": PLACEHOLDER,
    "Qwen2_5OmniForConditionalGeneration": PLACEHOLDER,
    "Qwen4ExpForConditionalGeneration": "its decoder layers take ple_input_ids, which nobody can shorten",
    "T5Gemma2ForConditionalGeneration": ENCODER,
    "UdopForConditionalGeneration": PLACEHOLDER,
    "UnlimitedOcrForConditionalGeneration": "its decoder has layers of type reference_sliding_attention",
    "VisionEncoderDecoderModel": PLACEHOLDER,
}
# Whose configuration cannot be made small by the names of its sizes only.
LARGE = (
    "Dots3NoteForConditionalGeneration",
    "Florence2ForConditionalGeneration",
    "Glm5NextForConditionalGeneration",
)
# Whose default configuration cannot be built before transformers 5.23.
NEWER = ("DiffusionGemmaForBlockDiffusion", "VisionEncoderDecoderModel")


def possible(name: str) -> bool:
    """Whether the installed transformers can build the class."""
    old = Version(transformers.__version__) < Version("5.23")
    return hasattr(transformers, name) and not (old and name in NEWER)


def hollow(name: str):
    """A model of the class on the meta device: it has a structure and no weights."""
    made = getattr(transformers, name)
    config = made.config_class() if name in LARGE else recipe(name)("")
    with torch.device("meta"):
        return made._from_config(config, attn_implementation="eager")
