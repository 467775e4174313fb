"""Convert kernels between our layout and those of other sparse convolution libraries.

Ours is MinkowskiEngine 0.5's: `kernel` [K*K*K, Cin, Cout], its slice ix + K * (iy + K * iz) belonging to the offset
(ix, iy, iz), so x varies fastest; offsets are centered for odd K and start at 0 for even K; the sum is a correlation,
and a transposed convolution adds the same offsets instead of subtracting them. K = 1 with stride 1 is [Cin, Cout], a
bias [1, Cout], and the tensors of a norm lie one level down, `<norm>.bn.weight`.

| library | convolution | order | bias | norm |
|---|---|---|---|---|
| ME 0.3, 0.4 | as ours | as ours, but "hybrid" in the residual blocks of PointContrast and CSC | as ours | as ours |
| spconv 2.2, 2.3 | `weight` [Cout, K, K, K, Cin] | axes follow the columns of `indices` | [Cout] | `.weight` |
| torchsparse 1.4 to 2.1 | `kernel`, shaped as ours | x fastest for odd K, z fastest for K = 2 | [Cout] | `.weight` |

Functions on state dicts take that of one 3D network; tensors that need no change are not copied. A conversion leaves
no trace in the tensors, so converting twice goes unnoticed and is wrong.

Sources: reference runs of ME 0.4.3 and 0.5.4 and of spconv 2.3.8; torchsparse (MIT) as its own test compares it with
dense convolution.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from geo_pretrain.convert.keys import State
from geo_pretrain.errors import some

if TYPE_CHECKING:
    from torch import Tensor

Columns = Literal["zyx", "xyz"]
HYBRID_KEYS = re.compile(r"block\d\.\d+\.conv[12]\.kernel")  # kernels of the residual blocks of PointContrast and CSC
PREFIXED = re.compile(rf".+\.{HYBRID_KEYS.pattern}")


# --- MinkowskiEngine 0.3 and 0.4 ---


def hybrid_to_cube() -> list[int]:
    """The index p [27] with cube_kernel = hybrid_kernel[p].

    ME up to 0.4 lists the 27 offsets of its mixed ("hybrid") region center first; then, one axis after the other, each
    offset listed so far comes again with -1 and with +1 on that axis.
    """
    hybrid: list[tuple[int, ...]] = [(0, 0, 0)]
    for axis in range(3):
        hybrid += [(*offset[:axis], step, *offset[axis + 1 :]) for offset in hybrid for step in (-1, 1)]
    return [hybrid.index((x, y, z)) for z, y, x in itertools.product((-1, 0, 1), repeat=3)]


def from_me04(state: State) -> dict[str, Tensor]:
    """Reorder the block kernels of a PointContrast or CSC state dict (ME 0.3 or 0.4) to the order of ME 0.5."""
    return _reorder_blocks(state, hybrid_to_cube())


def to_me04(state: State) -> dict[str, Tensor]:
    """Reorder the block kernels of our state dict to the order PointContrast's and CSC's code expects under ME 0.4."""
    permutation = hybrid_to_cube()
    return _reorder_blocks(state, [permutation.index(slice_) for slice_ in range(27)])


def _reorder_blocks(state: State, permutation: list[int]) -> dict[str, Tensor]:
    reordered = dict(state)
    if prefixed := [key for key in state if PREFIXED.fullmatch(key)]:  # they would stay as they are, without a word
        raise ValueError(f"{some(map(repr, prefixed))} have a prefix; accepted: keys such as 'block1.0.conv1.kernel'.")
    for key in filter(HYBRID_KEYS.fullmatch, state):
        if state[key].ndim != 3 or len(state[key]) != 27:
            raise ValueError(f"{key!r} is {list(state[key].shape)}; accepted: [27, Cin, Cout].")
        reordered[key] = state[key][permutation]
    return reordered


# --- spconv 2 ---


def kernel_to_spconv(kernel: Tensor, columns: Columns = "zyx") -> Tensor:
    """Convert our kernel to the `weight` [Cout, K, K, K, Cin] of spconv's convolutions.

    `columns` are the spatial columns of the `indices` spconv is given: its documents call them (z, y, x), some code
    bases (Pointcept) put (x, y, z) there. The same weight serves SubMConv3d, SparseConv3d with K = stride, and
    SparseInverseConv3d. spconv has no negative coordinates: shift the scene by a multiple of the coarsest stride.

    K = 1 is an exception: spconv up to 2.3.8 reads the memory of that weight as [Cin, Cout], against its shape (issue
    450 of traveller59/spconv), so the result has that memory layout.
    """
    if _size(kernel) == 1:
        return kernel.reshape(kernel.shape[-1], 1, 1, 1, kernel.shape[-2])
    axes = (4, 0, 1, 2, 3) if _checked(columns) == "zyx" else (4, 2, 1, 0, 3)
    return _cube(kernel).permute(axes).contiguous()


def kernel_from_spconv(weight: Tensor, columns: Columns = "zyx") -> Tensor:
    """Convert a spconv `weight` [Cout, K, K, K, Cin] to our kernel [K*K*K, Cin, Cout], or [Cin, Cout] for K = 1."""
    if weight.ndim != 5 or len(set(weight.shape[1:4])) != 1:
        raise ValueError(f"weight is {list(weight.shape)}; accepted: [Cout, K, K, K, Cin] (spconv 2.2 and 2.3).")
    if weight.shape[1] == 1:
        return weight.reshape(weight.shape[-1], weight.shape[0])
    axes = (1, 2, 3, 4, 0) if _checked(columns) == "zyx" else (3, 2, 1, 4, 0)
    return weight.permute(axes).flatten(0, 2).contiguous()


def to_spconv(state: State, *, columns: Columns = "zyx") -> dict[str, Tensor]:
    """Convert our state dict for a network of spconv layers with the same module names and nn.BatchNorm1d norms.

    >>> import torch
    >>> sorted(to_spconv({"bn0.bn.weight": torch.ones(2), "conv.kernel": torch.ones(27, 3, 2)}))
    ['bn0.weight', 'conv.weight']
    """
    return _to_plain_names(state, "weight", lambda kernel: kernel_to_spconv(kernel, columns))


def from_spconv(state: State, *, columns: Columns = "zyx") -> dict[str, Tensor]:
    """The inverse of `to_spconv`; norms are recognized by their running mean, convolutions by five dimensions."""
    return _from_plain_names(state, "weight", lambda weight: kernel_from_spconv(weight, columns))


def _checked(columns: Columns) -> Columns:
    if columns not in ("zyx", "xyz"):
        raise ValueError(f"columns is {columns!r}; accepted: 'zyx', 'xyz'.")
    return columns


# --- torchsparse ---


def kernel_to_torchsparse(kernel: Tensor) -> Tensor:
    """Convert our kernel to torchsparse's order: K = 2 changes from x fastest to z fastest, odd K stays.

    Raises ValueError for larger even K, whose offsets torchsparse centers differently (-1 .. K-2 for K = 4).
    """
    size = _size(kernel)
    if size % 2 == 1:
        return kernel
    if size > 2:
        raise ValueError(f"Kernel size {size}: torchsparse places even windows elsewhere; accepted: 2 and odd sizes.")
    return _cube(kernel).permute(2, 1, 0, 3, 4).flatten(0, 2).contiguous()


def kernel_from_torchsparse(kernel: Tensor) -> Tensor:
    """Convert torchsparse's kernel to our order: K = 2 changes from z fastest to x fastest, odd K stays.

    Raises ValueError for larger even K, as `kernel_to_torchsparse`, which is its own inverse.
    """
    return kernel_to_torchsparse(kernel)


def to_torchsparse(state: State) -> dict[str, Tensor]:
    """Convert our state dict for a network of torchsparse layers with the same module names."""
    return _to_plain_names(state, "kernel", kernel_to_torchsparse)


def from_torchsparse(state: State) -> dict[str, Tensor]:
    """The inverse of `to_torchsparse`; norms are recognized by their running mean."""
    return _from_plain_names(state, "kernel", kernel_from_torchsparse)


# --- what they share ---


def _size(kernel: Tensor) -> int:
    """K of a kernel [K*K*K, Cin, Cout] or [Cin, Cout]."""
    volume = len(kernel) if kernel.ndim == 3 else 1
    size = round(volume ** (1 / 3))
    if kernel.ndim not in (2, 3) or size**3 != volume:
        raise ValueError(f"kernel is {list(kernel.shape)}; accepted: [K*K*K, Cin, Cout], or [Cin, Cout] for K = 1.")
    return size


def _cube(kernel: Tensor) -> Tensor:
    """The kernel as [K, K, K, Cin, Cout] with axes (z, y, x)."""
    return kernel.reshape(*[_size(kernel)] * 3, *kernel.shape[-2:])


def _to_plain_names(state: State, leaf: str, kernel: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    plain = {}
    for key, value in state.items():
        module, _, last = key.rpartition(".")
        if last == "kernel":
            plain[f"{module}.{leaf}"] = kernel(value)
        elif last == "bias" and f"{module}.kernel" in state:
            plain[key] = value.reshape(-1)
        elif module.endswith(".bn"):
            plain[f"{module.removesuffix('.bn')}.{last}"] = value
        else:
            plain[key] = value
    return plain


def _from_plain_names(state: State, leaf: str, kernel: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    ours = {}
    for key, value in state.items():
        module, _, last = key.rpartition(".")
        weight = state.get(f"{module}.{leaf}")
        convolves = weight is not None and (leaf == "kernel" or weight.ndim == 5)
        if f"{module}.running_mean" in state:
            ours[f"{module}.bn.{last}"] = value
        elif last == leaf and convolves:
            ours[f"{module}.kernel"] = kernel(value)
        elif last == "bias" and convolves:
            ours[key] = value.reshape(1, -1)
        else:
            ours[key] = value
    return ours
