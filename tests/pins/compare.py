"""Two trees of what was stored and what was found, compared leaf by leaf."""

from __future__ import annotations

import math
from typing import Any

RELATIVE = 1e-3  # other processors sum in another order


def assert_same(
    found: Any, stored: Any, *, relative: float = RELATIVE, absolute: float = 1e-6, more: bool = False, at: str = ""
) -> None:
    """Whether everything stored is found, numbers with a fraction nearly; `more`: keys may have been added."""
    if isinstance(stored, dict):
        assert isinstance(found, dict), f"{at}: {found!r}, stored is a mapping"
        missing, added = stored.keys() - found.keys(), found.keys() - stored.keys()
        assert not missing, f"{at}: {sorted(missing)} are gone"
        assert more or not added, f"{at}: {sorted(added)} are new"
        pairs = {str(key): (found[key], stored[key]) for key in stored}
    elif isinstance(stored, list):
        assert isinstance(found, list), f"{at}: {found!r}, stored is a list"
        assert len(found) == len(stored), f"{at}: {found}, stored is {stored}"
        pairs = {str(k): pair for k, pair in enumerate(zip(found, stored, strict=True))}
    elif isinstance(stored, float) and isinstance(found, float):
        near = math.isclose(found, stored, rel_tol=relative, abs_tol=absolute)
        assert near, f"{at}: {found}, stored is {stored}"
        return
    else:
        assert type(found) is type(stored), f"{at}: {found!r}, stored is {stored!r}"
        assert found == stored, f"{at}: {found!r}, stored is {stored!r}"
        return
    for key, (one, other) in pairs.items():
        assert_same(one, other, relative=relative, absolute=absolute, more=more, at=f"{at}/{key}")


def without(tree: Any, volatile: frozenset[str]) -> Any:
    """A tree whose volatile entries say only that they are there."""
    if isinstance(tree, dict):
        return {key: "..." if key in volatile else without(value, volatile) for key, value in tree.items()}
    return [without(value, volatile) for value in tree] if isinstance(tree, list) else tree
