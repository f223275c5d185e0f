"""`import prunekern.hf` teaches transformers to load compact models: see `prunekern.compacting.hf`."""

from .compacting.hf import FORMAT, METHOD, PrunekernConfig, PrunekernQuantizer
from .compacting.skeleton import skeleton

__all__ = ["FORMAT", "METHOD", "PrunekernConfig", "PrunekernQuantizer", "skeleton"]
