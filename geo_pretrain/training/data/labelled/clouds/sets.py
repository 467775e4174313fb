"""The rows of the data sets of labelled clouds in the registry."""

from __future__ import annotations

from geo_pretrain.training.data.labelled.dataset import DataSet

CLOUD_SETS: dict[str, DataSet] = {}
