"""transformers' models of the decoder families, whose blocks may run as one call.

To everyone they are what they were: they have transformers' names, which config.json writes down under
`architectures`, and are printed as transformers' classes, which is what it finds their recorded outputs by.
"""

from __future__ import annotations

from typing import Any

from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from .stack import CompactDecoderModel


class _PrintedAsItsBase(type):
    def __repr__(cls) -> str:
        base: Any = cls.__bases__[-1]
        return repr(base)


class LlamaModel(CompactDecoderModel, modeling_llama.LlamaModel, metaclass=_PrintedAsItsBase):
    pass


class MistralModel(CompactDecoderModel, modeling_mistral.MistralModel, metaclass=_PrintedAsItsBase):
    pass


class Qwen2Model(CompactDecoderModel, modeling_qwen2.Qwen2Model, metaclass=_PrintedAsItsBase):
    pass


class Qwen3Model(CompactDecoderModel, modeling_qwen3.Qwen3Model, metaclass=_PrintedAsItsBase):
    pass
