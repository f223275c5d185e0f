"""`import prunekern.hf` teaches transformers to load compact models (see `prunekern.compacting.hf`), and masked ones
that a Trainer saved in the middle of a run (`prunekern.pruning.masked_hf`).
"""

from .compacting.hf import FORMAT, METHOD, PrunekernConfig, PrunekernQuantizer
from .compacting.skeleton import skeleton
from .pruning import masked_hf as _masked_hf  # noqa: F401  (registers the other format)

__all__ = ["FORMAT", "METHOD", "PrunekernConfig", "PrunekernQuantizer", "skeleton"]
