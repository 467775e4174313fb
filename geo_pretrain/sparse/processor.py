"""The processor for which the fast kernels are compiled, and the sizes of blocks that kernels and callers agree on."""

from __future__ import annotations

import os

from geo_pretrain.errors import require

llvm = require("llvmlite.binding", "fast")

# Numba's own settings, for compiling for another processor.
NAME: str = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
FEATURES: str = os.environ.get("NUMBA_CPU_FEATURES") or llvm.get_host_cpu_features().flatten()

TILE = 256  # output rows a task: their sums stay in the second-level cache
VOXELS = 256  # voxels a task of the neighbor search
BLOCK = 6  # rows of a register block
# Floats of a vector and vectors of a register block's row: the sums of 6 rows fill 24 of 32 registers, or 12 of 16.
LANES, WIDEST = (16, 4) if "+avx512f" in FEATURES else (8, 2) if "+avx" in FEATURES else (4, 4)
BF16 = LANES == 16 and "+avx512bf16" in FEATURES  # whether it multiplies bfloat16 itself
AMX = BF16 and {"+amx-tile", "+amx-bf16"} <= set(FEATURES.split(","))  # whether it does so by tiles
SIDE = 32  # rows and columns of a block of two by two tiles of AMX
