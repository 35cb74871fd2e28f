"""Pytrees of tensors as one vector each, and back."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor


@dataclass(frozen=True)
class TreeShape:
    """The structure of a pytree of tensors, and their shapes; its numbers stand in a vector leaf after leaf."""

    spec: Any
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, tree: Any) -> TreeShape:
        """That of a pytree of tensors."""
        leaves, spec = torch_pytree.tree_flatten(tree)
        return cls(spec, tuple(leaf.shape for leaf in leaves))

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return sum(shape.numel() for shape in self.shapes)

    def tree(self, x: Tensor) -> Any:
        """The pytree of the numbers x (size,)."""
        ends = list(itertools.accumulate(shape.numel() for shape in self.shapes))
        parts = torch.tensor_split(x, ends[:-1])
        leaves = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return torch_pytree.tree_unflatten(leaves, self.spec)

    def fits(self, tree: Any) -> bool:
        """Whether `tree` has this structure and these shapes."""
        try:
            leaves = self.spec.flatten_up_to(tree)  # keys of a dict may come in any order
        except ValueError:
            return False
        dense = all(isinstance(leaf, Tensor) and leaf.layout == torch.strided for leaf in leaves)
        return dense and tuple(leaf.shape for leaf in leaves) == self.shapes

    def vector(self, tree: Any, name: str) -> Tensor:
        """The numbers of `tree`, (size,), if it has this structure and these shapes."""
        if not self.fits(tree):
            wanted = torch_pytree.tree_unflatten([tuple(shape) for shape in self.shapes], self.spec)
            got = torch_pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, tree)
            raise ValueError(f"{name} must be a pytree of dense tensors of shapes {wanted}, got {got}")
        leaves = self.spec.flatten_up_to(tree)
        devices = {str(leaf.device) for leaf in leaves}
        if len(devices) > 1:
            raise ValueError(f"{name} must be on one device, got {sorted(devices)}")
        return torch.cat([leaf.reshape(-1) for leaf in leaves])
