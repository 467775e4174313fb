"""The limitations that a card states."""

from __future__ import annotations

from geo_pretrain.catalog.entry import Entry, License
from geo_pretrain.catalog.license import PERMISSIVE
from geo_pretrain.contract import ImageContract, VoxelContract


def entry_limits(entry: Entry) -> list[str]:
    """The limitations of a catalog entry, one sentence each."""
    reached = "whether weights made with this project reach the numbers above was not measured"
    first = {
        "published-here": "See the folder's own card for what was measured." if not entry.results else "",
        "published-by-authors": "What the converted weights reach was not measured with this project"
        + ("." if entry.results else ", and the authors report no number for them."),
        "regenerable": f"The recipe's full length is not part of any test; {reached}."
        if entry.results
        else "No number is stated for them; `geo-pretrain eval matching DIR` measures those you make.",
        "planned": "Nothing was measured with this project.",
    }[entry.status]
    return [*filter(None, [first]), *_common_limits(entry.contract, entry.license, entry.data)]


def folder_limits(
    contract: ImageContract | VoxelContract, license: License, data: str, theirs: bool, measured: bool, reported: bool
) -> list[str]:
    """The limitations of a checkpoint folder, one sentence each.

    `theirs`: its weights are the authors'; `measured`, `reported`: this project, or the authors, state results.
    """
    limits = []
    if not measured:
        what = "What the converted weights reach" if theirs else "What these weights bring to a task"
        limits.append(f"{what} was not measured" + (" with this project." if theirs else "."))
    if theirs and not reported:
        limits.append("The authors report no number for them.")
    return limits + _common_limits(contract, license, data)


def _common_limits(contract: ImageContract | VoxelContract, license: License, data: str) -> list[str]:
    limits = ["Pre-trained features to fine-tune from: by themselves they name no class and no object."]
    if data == "rooms":
        limits.append("Rooms are procedural: their shapes, textures and noise are simpler than those of real scans.")
    if isinstance(contract, ImageContract):
        size = "x".join(map(str, contract.size))
        limits.append(f"Pre-training saw {data} at {size} pixels; other sizes run, but were no part of it.")
    elif not contract.given_channels:
        limits.append("Colors are not used: the network was shown geometry alone, at one voxel size.")
    else:
        limits.append("The features hold for this voxel size and these channels; others were not shown to the network.")
    if license.weights not in PERMISSIVE:
        limits.append("The weights' license limits what they may be used for; see below.")
    return limits
