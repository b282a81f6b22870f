"""What vLLM knows of a request's pictures before they are seen: how many tokens stand for each, and what its
caches call them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig

from ..config import Compression
from .settings import KEY, RATIO, cache_key, compression_of, slots, targets, with_request

KEPT = "libra_kept"  # of the tensors of a picture: how many of its tokens are kept


def _without_ratio(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in kwargs.items() if name != RATIO}


def longest_piece(vllm_config) -> int:
    """The most columns that vLLM gives a model at once, of prompts and answers together."""
    scheduler, graphs = vllm_config.scheduler_config, vllm_config.compilation_config
    captured = graphs.max_cudagraph_capture_size or 0
    return max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, captured)


class Info:
    """In front of vLLM's own class for what is known of a model's inputs."""

    @cached_property
    def compression(self) -> Compression:
        """The server's."""
        return compression_of(self.get_hf_config())

    def get_hf_processor(self, **kwargs):
        return super().get_hf_processor(**_without_ratio(kwargs))

    def get_supported_mm_limits(self):
        limits = super().get_supported_mm_limits()
        if not self.compression.compresses:
            return limits
        return {"image": limits["image"]}  # vLLM has --video-pruning-rate for videos


class Processor:
    """In front of vLLM's own processor. Of a subclass, :meth:`tokens` says how many tokens each picture
    has."""

    def tokens(self, tensors: Mapping) -> list[int]:
        """The tokens of the pictures whose tensors these are."""
        raise NotImplementedError

    def _compression(self, kwargs: Mapping[str, object]) -> Compression:
        return with_request(self.info.compression, kwargs)

    def _call_hf_processor(self, hf_data, hf_kwargs):
        return super()._call_hf_processor(hf_data, _without_ratio(hf_kwargs))

    def _postprocess_hf_mm_data(self, mm_inputs, hf_processor_mm_kwargs, processed_data):
        data = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        compression = self._compression(hf_processor_mm_kwargs)
        if self.info.compression.compresses and "pixel_values" in data:
            data[KEPT] = torch.tensor([targets(compression, n) for n in self.tokens(data)])
        return data

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        if self.info.compression.compresses:
            fields[KEPT] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _columns(self, n: int, kwargs: Mapping[str, object]) -> int:
        """How many tokens of a prompt stand for a picture of n."""
        compression = self._compression(kwargs)
        return slots(compression, n, targets(compression, n))

    def _get_mm_hashes(self, inputs):
        """The caches' keys have the method and the rate in them, whoever named them."""
        if not self.info.compression.compresses:
            return super()._get_mm_hashes(inputs)
        kwargs = inputs.hf_processor_mm_kwargs
        own = {**_without_ratio(kwargs), KEY: cache_key(self._compression(kwargs))}
        return super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=own))
