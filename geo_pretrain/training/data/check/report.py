"""What a check found: findings, the options that would mend them, and both as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from geo_pretrain.training.data.check.conventions import Fits
from geo_pretrain.training.data.check.registration import Registration
from geo_pretrain.training.data.check.sample import Sample
from geo_pretrain.training.recipe import DataSpec


class Level(IntEnum):
    """How bad a finding is."""

    OK = 0
    UNKNOWN = 1  # the frames do not tell
    DOUBTFUL = 2  # likely wrong: `train` warns
    WRONG = 3  # surely wrong: `train` stops


@dataclass(frozen=True)
class Finding:
    """One topic of a check: how it is, in a sentence, with numbers and the options that would mend it."""

    topic: str
    level: Level
    text: str
    options: Mapping[str, Any] = field(default_factory=dict)  # of the source, key -> value
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All findings on a source."""

    spec: DataSpec
    findings: tuple[Finding, ...]
    sample: Sample
    fits: Fits | None = None
    registration: Registration | None = None

    @property
    def level(self) -> Level:
        """The worst level of all findings."""
        return max((finding.level for finding in self.findings), default=Level.OK)

    def at(self, level: Level) -> list[Finding]:
        """Findings at a level."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def options(self) -> dict[str, Any]:
        """All options that findings suggest."""
        return {key: value for finding in self.findings for key, value in finding.options.items()}

    def paste(self) -> str:
        """The suggested options as they are pasted behind any command with --data; "" for none."""
        return " ".join(f"--set data.options.{key}={_shell(value)}" for key, value in self.options.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        findings = [
            {"topic": f.topic, "level": f.level.name.lower(), "text": f.text, "options": dict(f.options), **f.numbers}
            for f in self.findings
        ]
        return {
            "source": self.spec.source,
            "path": self.spec.path,
            "level": self.level.name.lower(),
            "findings": findings,
            "options": self.options,
            "paste": self.paste(),
            "skipped": self.sample.skips.reasons,
        }


def _shell(value: object) -> str:
    """A value as YAML on a command line."""
    text = json.dumps(value) if not isinstance(value, str) else value
    return shlex.quote(text)
