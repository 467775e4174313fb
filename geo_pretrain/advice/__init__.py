"""Which checkpoint for a task? The answer is derived from the catalog and the recipes, without torch or a network."""

from __future__ import annotations

from geo_pretrain.advice.answer import Recommendation, recommend
from geo_pretrain.advice.questions import INPUTS, TASKS
from geo_pretrain.advice.ranking import Pick

__all__ = ["INPUTS", "TASKS", "Pick", "Recommendation", "recommend"]
