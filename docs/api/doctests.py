"""For the site: examples in docstrings (`>>>`) become blocks of code."""

from __future__ import annotations

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Fence every example of a docstring, up to the next empty line."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called with every module, class and function."""
        if obj.docstring is None or ">>> " not in obj.docstring.value:
            return
        lines, inside = [], False
        for line in obj.docstring.value.splitlines():
            if line.lstrip().startswith(">>> ") and not inside:
                lines.append("```pycon")
                inside = True
            elif inside and not line.strip():
                lines.append("```")
                inside = False
            lines.append(line.strip() if inside else line)
        obj.docstring.value = "\n".join([*lines, "```"] if inside else lines)
