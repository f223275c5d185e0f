"""Rows of like length together, in an order that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ByEpoch(torch.utils.data.Sampler[int]):
    """Rows of like length together, in an order that is a function of seed and epoch alone.

    transformers draws it from the global generator, which a run resumed in a later epoch finds in another state.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0
        sampler.generator = torch.Generator(device="cpu")

    def set_epoch(self, epoch: int) -> None:
        """What `__iter__` starts from next; the Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0]
        self.sampler.generator.manual_seed(int(mixed) & (2**63 - 1))
        return iter(self.sampler)
