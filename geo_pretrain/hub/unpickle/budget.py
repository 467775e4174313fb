"""What reading one file may cost, and the suspicious names met on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

from geo_pretrain.hub.unpickle.names import SHOWN, Refused, shown


@dataclass
class Budget:
    """The limits of one file, counted down: pickle instructions, and bytes of decoded text."""

    operations: int
    recoded: int
    names: dict[str, None] = field(default_factory=dict)  # classes without a stand-in that the file names
    forbidden: dict[str, None] = field(default_factory=dict)  # those, and calls, for which it is refused

    def spend(self, operations: int = 1) -> None:
        """Count instructions; raises `Refused` when the limit is reached."""
        self.operations -= operations
        if self.operations < 0:
            raise Refused("its pickle has more instructions than are accepted")

    def recode(self, size: int) -> None:
        """Count bytes of decoded text; raises `Refused` when the file unfolds to far more than its own size."""
        self.recoded -= size
        if self.recoded < 0:
            raise Refused("its pickle unfolds to far more than the file holds")

    def forbid_call(self, what: str) -> None:
        """Note a call for which the file is refused, unless it is already for the name."""
        if what not in self.forbidden:
            self.forbidden[f"{shown(what)} (to be called)"] = None

    def check_names(self) -> None:
        """Raises `Refused`, listing the forbidden names, if the file has any."""
        if self.forbidden:
            names = list(self.forbidden)
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            listed = ", ".join(names[:SHOWN]) + more
            raise Refused(
                f"it names {listed}, not on the list of what a file of weights may name and call. Nothing of it was "
                "executed; a file that holds the state_dict alone is accepted"
            )
