"""Everything known about a checkpoint, as sections of labelled rows that explain themselves: what `info` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from geo_pretrain.backbones.architectures import Arch
from geo_pretrain.cards.sections import input_rows, papers_of
from geo_pretrain.cards.usage import output_channels
from geo_pretrain.catalog.entry import METRICS, Entry, License, Result
from geo_pretrain.catalog.tables import scratch_values
from geo_pretrain.checkpoint import FINETUNED, Checkpoint
from geo_pretrain.contract import ImageContract, VoxelContract

RESULT_HEAD = ("task", "data", "metric", "value", "random", "from")
ROLES = {  # what a file of a checkpoint folder holds
    "encoder": "weights of the encoder",
    "decoder": "weights of the decoder",
    "model": "weights of the network",
    "heads": "weights used in pre-training alone",
    "teacher": "weights of the network that taught it",
    "golden": "an input and the outputs to expect",
    "recipe": "the recipe that made it",
    "log": "the log of its training",
    "card": "its description",
}
# Labels of what config.json says of the making; the other keys of it are printed as they are.
PROVENANCE = {
    "data source": "data",
    "data fingerprint": "digest of the data",
    "data pairs": "pairs of frames",
    "steps": "training steps",
    "seconds": "training time in seconds",
    "processes": "processes at once",
    "micro_batch": "samples a process takes at once",
    "negatives": "negatives come from the",
    "device": "device",
    "seed": "random seed",
    "init": "started from",
    "notes": "remarks on the data",
    "code": "version of this library",
    "python": "version of Python",
    "source url": "the file's address",
    "source sha256": "the file's sha256",
    "source size": "the file's size in bytes",
    "not_used": "tensors of the file that were not used",
    "prefix": "prefix of the names in the file",
    "converted_by": "converted by version",
    "conversion": "version of the conversion",
    "finetuned recipe": "fine-tuned by the recipe",
    "finetuned task": "task",
    "finetuned network": "network around the backbone",
    "finetuned metric": "its score counts",
    "finetuned score": "score on the validation data",
    "finetuned seed": "random seed",
    "finetuned steps": "training steps",
    "finetuned backbone name": "backbone",
    "finetuned backbone digest": "digest of the backbone",
    "finetuned last step": "step of the score",
    "finetuned data fraction": "share of the labelled data",
    "finetuned data train images": "training images",
    "finetuned data val images": "validation images",
    "finetuned data source": "labelled data",
    "finetuned data terms": "terms of the labelled data",
}
TWICE = ("contract",)  # of provenance, which other sections have
DEEPEST = 3  # keys; below are lists of numbers, such as a confusion matrix, which JSON has


@dataclass(frozen=True)
class Section:
    """Rows under a title, with a sentence that says how to read them; `head` are the columns where there are more."""

    title: str
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    head: tuple[str, ...] = ()

    def lines(self, width: int) -> list[str]:
        """The rows in `width` columns; words longer than that, such as addresses, are not cut: people copy them."""
        rows = [self.head, *self.rows] if self.head else list(self.rows)
        ends = [max(map(len, column)) for column in list(zip(*rows, strict=True))[1:]] if self.head else []
        first = max(map(len, (row[0] for row in rows)), default=0)
        first = min(first, max(width - sum(ends) - 2 * len(ends), 20) if self.head else 24)
        lines = []
        for row in rows:
            wide, narrow = (row[0], row[1:]) if self.head else (row[1], ())
            folded = _wrapped(wide, first if self.head else max(width - first - 2, 20))
            if self.head:
                cells = "  ".join(cell.ljust(end) for cell, end in zip(narrow, ends, strict=True))
                lines += [f"{folded[0].ljust(first)}  {cells}".rstrip(), *folded[1:]]
            else:
                label = _wrapped(row[0], first)
                pairs = zip_longest(label, folded, fillvalue="")
                lines += [f"{left.ljust(first)}  {right}".rstrip() for left, right in pairs]
        return lines


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def size_text(size: int) -> str:
    """Bytes in kB or MB, which are thousands and millions of bytes."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def entry_sections(entry: Entry, how: str) -> list[Section]:
    """What the catalog knows of a checkpoint; `how`: what gets its weights onto this machine."""
    paper = entry.paper
    network = [("name", entry.name), ("what it learned", entry.description), ("pre-trained on", entry.data)]
    network += [("method", entry.method), ("paper", paper.title), ("authors", paper.authors)]
    network += [("published", f"{paper.venue} {paper.year}, {paper.url}")]
    return [
        Section("Checkpoint", network),
        *_network_sections(entry.arch, entry.contract),
        Section("Weights", _weights_rows(entry, how)),
        _license_section(entry.license),
        *_result_sections(entry),
    ]


def folder_sections(checkpoint: Checkpoint) -> list[Section]:
    """What a checkpoint folder says of itself."""
    ended = "to its end" if checkpoint.finished else "not to its end: it goes on, or was stopped"
    rows = [("name", checkpoint.name), ("folder", str(checkpoint.folder)), ("trained", ended)]
    files = [
        (name, f"{ROLES.get(file.role, file.role)}, {size_text(file.size)}") for name, file in checkpoint.files.items()
    ]
    made = [(label, text) for label, text in _provenance_rows(checkpoint.provenance) if text]
    return [
        Section("Checkpoint", rows),
        *_network_sections(checkpoint.arch, checkpoint.contract),
        Section("Files", files, "In the folder."),
        _license_section(checkpoint.license),
        Section("How it was made", made, "As config.json states it."),
    ]


def loaded_section(report: Any, folder: str) -> Section:
    """The load report of every tensor, as `load_backbone` gives it."""

    def some(keys: Iterable[str]) -> str:
        return ", ".join(keys) or "none"

    rows = [
        ("loaded from", folder),
        ("coverage", f"{report.coverage:.0%} of the network's tensors came from the files"),
        ("tensors loaded", str(report.loaded)),
        ("newly initialized", some(report.fresh)),
        ("in the files, not used", some(report.dropped)),
        ("changed in shape", some(report.reshaped)),
    ]
    return Section("Loaded", rows, "Tensors by their names in the network.")


def _network_sections(arch: Arch, contract: ImageContract | VoxelContract) -> list[Section]:
    rows = [("network", arch.title), ("class and sizes", str(arch))]
    if isinstance(contract, ImageContract):
        channels, strides = (", ".join(map(str, values)) for values in zip(*arch.maps, strict=True))
        rows += [("encoder gives", f"maps [B, C, H / stride, W / stride], C {channels}, strides {strides} pixels")]
        if arch.has_decoder:
            stride = arch.architecture.dense_stride
            side = "the image's size" if stride == 1 else f"1/{stride} of the image's height and width"
            rows += [("decoder gives", f"{output_channels(arch)} features a pixel, at {side} (decoder=True)")]
    else:
        rows += [
            ("gives", "features of each point, [N, D]: `.encode_points(points, features)`, points [N, 3] in meters")
        ]
    note = "`.transforms` of the loaded network makes this of an image." if arch.modality == "2d" else ""
    note = note or "`.transforms` of the loaded network makes this of points."
    return [Section("Network", rows), Section("Input", input_rows(arch, contract), note)]


def _weights_rows(entry: Entry, how: str) -> list[tuple[str, str]]:
    rows = [("how to get them", how)]
    if entry.status in ("published-here", "published-by-authors"):
        rows += [("fetch them", f"geo-pretrain pull {entry.name}")]
    for file in entry.files:
        what = ROLES.get(file.role, file.role)
        rows += [(file.name, f"{what}, {size_text(file.size)}, from {', '.join(file.sources)}")]
    for theirs in entry.authors_files:
        size = "" if theirs.size is None else f", {size_text(theirs.size)}"
        rows += [
            ("authors' file", f"{theirs.content} (gives {', '.join(theirs.roles)}{size}; read as {theirs.format})")
        ]
        rows += [("its address", theirs.url)]
    if entry.recipe is not None:
        rows += [("make them", entry.train_command())]
    rows += [("trained", entry.made)] if entry.made else []
    return [*rows, ("without weights", f'gp.load_backbone("{entry.name}", pretrained=False): no network needed')]


def _license_section(license: License) -> Section:
    rows = [("the weights", license.weights), ("code that makes them", license.code)]
    rows += [(f"data: {name}", terms) for name, terms in license.datasets]
    note = "The weights' license is what counts for you: the strictest of all that went into them."
    return Section("License", [*rows, ("started from", license.base_model)], note)


def _result_sections(entry: Entry) -> list[Section]:
    sections = []
    if entry.results:
        scratch = scratch_values(entry)
        rows = [_result_row(result, f"{scratch[result]:g}" if result in scratch else "-") for result in entry.results]
        note = (
            'In percent, of networks fine-tuned from these weights, as papers report them. "random": the same network '
            "from random weights, in the same table; -: not stated. None was measured here."
        )
        sections += [Section("Reported results", rows, note, RESULT_HEAD), _legend(entry)]
    if entry.measured:
        note = "Measured with this project, of these very files; (%) means percent."
        sections.append(Section("Measured results", list(map(_measured_row, entry.measured)), note))
    return sections


def _result_row(result: Result, random: str) -> tuple[str, ...]:
    return (result.task, result.dataset, result.metric, f"{result.value:g}", random, result.table)


def _measured_row(result: Result) -> tuple[str, str]:
    remark = f"; {result.note}" if result.note else ""
    return f"{result.task}, {result.dataset}", f"{result.value:g} {result.metric}{remark}; from {result.table}"


def _legend(entry: Entry) -> Section:
    """What the metrics and tables of the results are called in full."""
    metrics = dict.fromkeys(result.metric for result in entry.results)
    tables: dict[str, list[str]] = {}
    for table, paper in papers_of(entry).items():
        tables.setdefault(f"{paper.title} ({paper.venue} {paper.year})", []).append(table)
    rows = [(metric, METRICS.get(metric, "")) for metric in metrics]
    rows += [(", ".join(labels), title) for title, labels in tables.items()]
    note = '"from" names the paper: T1 is its table 1, README that of its repository.'
    return Section("What these names mean", rows, note)


def _provenance_rows(facts: Mapping[str, Any], keys: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        path = (*keys, str(key))
        if isinstance(value, Mapping):
            if key in TWICE:
                continue
            rows += _provenance_rows(value, path) if len(path) < DEEPEST else []
            continue
        name = " ".join(path)
        label = PROVENANCE.get(name) or (
            f"version of {key}" if keys == ("libraries",) else name.removeprefix(f"{FINETUNED} ").replace("_", " ")
        )
        items = list(value) if isinstance(value, list | tuple) else [value]
        rows.append((label, ", ".join(str(item) for item in items if item not in (None, ""))))
    return rows
