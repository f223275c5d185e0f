"""The files of a dense checkpoint by the names that the model's linears have once its fused ones are split."""

from __future__ import annotations

from torch import Tensor

from ..families.fused import Fused
from ..storage.shards import Shards


class SplitShards(Shards):
    """`Shards` in which every fused linear's tensors are those of its parts: some of its rows, under their names.

    prefix: of the base model, which the names in the files may lack, or have besides.
    """

    def __init__(self, shards: Shards, fused: Fused, prefix: str):
        self._whole = shards
        self.where, self.files = shards.where, dict(shards.files)
        self.shapes, self.dtypes = dict(shards.shapes), dict(shards.dtypes)
        self._rows: dict[str, tuple[str, int, int]] = {}  # of a part: the tensor in the file, first row and how many
        for layer, parts in fused.items():
            for owner in {layer, layer.removeprefix(prefix), prefix + layer}:
                for leaf in ("weight", "bias"):
                    self._split(f"{owner}.{leaf}", {f"{owner}.{part}.{leaf}": n for part, n in parts.items()})

    def _split(self, name: str, parts: dict[str, int]) -> None:
        shape = self.shapes.get(name)
        if shape is None or not shape or shape[0] != sum(parts.values()):
            return  # the name of what is missing, or of another shape, is said by whoever looks for a part
        file, dtype = self.files.pop(name), self.dtypes.pop(name)
        first = 0
        for part, rows in parts.items():
            self._rows[part] = (name, first, rows)
            self.files[part], self.dtypes[part], self.shapes[part] = file, dtype, (rows, *shape[1:])
            first += rows
        del self.shapes[name]

    def read(self, name: str) -> Tensor:
        """As `Shards.read`."""
        if name not in self._rows:
            return self._whole.read(name)
        stored, first, rows = self._rows[name]
        return self._whole.read(stored).narrow(0, first, rows)
