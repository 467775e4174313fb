"""Checkpoints that Python packages of this project hold: digests, mirrors, numbers measured with these very files.

`geo-pretrain weights` writes this file; a name that stands here never changes meaning.
"""

from __future__ import annotations

from collections.abc import Mapping

from geo_pretrain.catalog.entry import Result, Shipped

__all__ = ["SHIPPED", "Result"]

SHIPPED: Mapping[str, Shipped] = {}
