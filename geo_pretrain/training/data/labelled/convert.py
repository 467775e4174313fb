"""Convert a published data set, once, to files that are read quickly: item by item, resumable, by several processes.

`OUT/conversion.jsonl` names what was made, and what was wrong with its raw files: a first line with the converter and
its settings, then one line an item. An item is a room, a scan or an image; it has one file, written atomically.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

from geo_pretrain.errors import BadFrame, DataError, unknown
from geo_pretrain.files import atomic_write, expanded, locked, parse_json, write_text
from geo_pretrain.training.config import Draft
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.labelled.clouds import s3dis, sunrgbd3d_raw
from geo_pretrain.training.data.labelled.dataset import NoOptions

INDEX = "conversion.jsonl"
VERSION = 1  # of the files that converters write; others are not continued

OnItem = Callable[[int, int], None]  # called with (done, total)


@dataclass(frozen=True)
class Converter:
    """A row of the registry. Its functions stand at the top of a module, so that processes can be sent to them."""

    items: Callable[[Path, Any], Sequence[str]]  # called with raw folder, options: names of the items, such as A/b
    convert: Callable[[Path, str, Any, Path], Sequence[str]]  # with raw folder, name, options, file to write: remarks
    suffix: str = ".ply"  # of an item's file, OUT/NAME.ply
    options: type = NoOptions  # dataclass of settings
    also: Callable[[Path, Path, Any], object] | None = None  # with raw folder, OUT, options: copies lists, at the end


CONVERTERS: dict[str, Converter] = {
    "s3dis": Converter(s3dis.raw_rooms, s3dis.convert_room, options=s3dis.S3DISConversion),
    "sunrgbd3d": Converter(
        sunrgbd3d_raw.raw_images, sunrgbd3d_raw.convert_image, ".npz", sunrgbd3d_raw.SUNRGBDConversion
    ),
}


@dataclass
class Conversion:
    """What a conversion did."""

    made: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)  # made by an earlier call
    remarks: dict[str, list[str]] = field(default_factory=dict)  # by item, those of earlier calls, too
    skips: SkippedFrames = field(default_factory=SkippedFrames)  # items that cannot be used

    def summary(self, limit: int = 10) -> str:
        """Say in lines what was made, and what was remarked on raw files; `skips` has a summary of its own."""
        left = f", {len(self.skips.reasons)} left out" if self.skips.reasons else ""
        lines = [f"{len(self.made)} made, {len(self.present)} there before{left}"]
        told = [f"{item}: {remark}" for item, remarks in sorted(self.remarks.items()) for remark in remarks]
        if told:
            more = f", {limit} of them (all: {INDEX})" if len(told) > limit else ""
            lines += [f"remarks on raw files: {len(told)}{more}", *(f"  {remark}" for remark in told[:limit])]
        return "\n".join(lines)


def list_converters() -> list[str]:
    """List the names that `convert_data` accepts."""
    return sorted(CONVERTERS)


def conversion_settings(name: str, overrides: Iterable[str] = ()) -> Any:
    """Parse texts `key=value` to the settings of a converter. Raises `UnknownName`, `RecipeError`."""
    return Draft({}, f"settings of converter {name!r}").override(overrides).parse(_row(name).options)


def convert_data(
    name: str,
    raw: Path,
    out: Path,
    *,
    settings: Any = None,
    workers: int = 1,
    progress: OnItem | None = None,
) -> Conversion:
    """Convert the data set in folder `raw` into folder `out`; items that are there already are kept.

    `settings`: those of `conversion_settings`, None for the defaults. `workers` processes convert items side by side.
    An item with a broken raw file is left out, and tried again by the next call. Raises `UnknownName`, `DataError` if
    `raw` lacks what is expected or `out` holds another conversion, `CheckpointError` while another process converts
    into `out`.
    """
    row = _row(name)
    settings = row.options() if settings is None else settings
    raw, out = expanded(raw), expanded(out)
    items = row.items(raw, settings)
    with locked(out / INDEX, busy=f"Another process converts into {str(out)!r}."):
        index = _read_index(out, {"converter": name, "version": VERSION, "settings": asdict(settings)})
        result = Conversion()
        for item in items:
            known = index.get(item, {})  # of a row that somebody changed, what is needed may lack: it is made anew
            if "bytes" in known and known["bytes"] == _size(out / f"{item}{row.suffix}"):
                result.present.append(item)
                result.remarks |= {item: known["remarks"]} if known.get("remarks") else {}
        present = set(result.present)
        waiting = [item for item in items if item not in present]
        _remove_parts(out / f"{item}{row.suffix}" for item in waiting)
        _convert_items(name, raw, out, settings, waiting, workers, result, progress or (lambda done, total: None))
        if row.also is not None:
            row.also(raw, out, settings)
    return result


def _remove_parts(paths: Iterable[Path]) -> None:
    """Remove what a process that was killed had begun to write (see `atomic_write`)."""
    for path in paths:
        for part in path.parent.glob(f".{escape(path.name)}.*.part"):
            part.unlink()


def _row(name: str) -> Converter:
    if name not in CONVERTERS:
        raise unknown("converter", name, list_converters())
    return CONVERTERS[name]


def _convert_items(
    name: str,
    raw: Path,
    out: Path,
    settings: Any,
    items: Sequence[str],
    workers: int,
    result: Conversion,
    progress: OnItem,
) -> None:
    """Convert `items`, noting each in the index as it is done."""
    before = len(result.present)
    for done, (item, remarks) in enumerate(_converted(name, raw, out, settings, items, workers), 1):
        if isinstance(remarks, BadFrame):
            result.skips.add(remarks)
        else:
            size = _size(out / f"{item}{CONVERTERS[name].suffix}")
            with (out / INDEX).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"item": item, "bytes": size, "remarks": remarks}) + "\n")
            result.made.append(item)
            result.remarks |= {item: remarks} if remarks else {}
        progress(before + done, before + len(items))


def _converted(
    name: str, raw: Path, out: Path, settings: Any, items: Sequence[str], workers: int
) -> Iterator[tuple[str, list[str] | BadFrame]]:
    """Yield every item as it is done, with its remarks or the reason why it cannot be used."""
    if workers <= 1 or len(items) <= 1:
        yield from ((item, _convert_item(name, raw, out, settings, item)) for item in items)
        return
    spawn = multiprocessing.get_context("spawn")  # forked processes of a program with threads may hang
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=spawn) as pool:
        futures = {pool.submit(_convert_item, name, raw, out, settings, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise DataError(
                f"A process that converted {name} was ended from outside, often for want of memory. What is done "
                "stays: the same command continues it; --workers 1 needs the least memory."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _convert_item(name: str, raw: Path, out: Path, settings: Any, item: str) -> list[str] | BadFrame:
    """Write one item's file; runs in any process."""
    row = CONVERTERS[name]
    try:
        with atomic_write(out / f"{item}{row.suffix}") as part:
            return list(row.convert(raw, item, settings, part))
    except BadFrame as bad:
        return bad


def _read_index(out: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """Read what is done, by item; begin the index where there is none. A last line that was cut off does not count."""
    path = out / INDEX
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(head) + "\n")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
    try:
        first, *rows = map(parse_json, lines)
    except ValueError as error:
        raise DataError(f"{path}: is no list of converted items ({error}); convert into another folder.") from None
    if first != head:
        raise DataError(
            f"{str(out)!r} holds a conversion by {json.dumps(first)}; this one is {json.dumps(head)}. Convert into "
            "another folder."
        )
    if not path.read_bytes().endswith(b"\n"):  # the next line must not be joined to half a line
        write_text(path, "\n".join(lines) + "\n")
    return {row["item"]: row for row in rows if isinstance(row, dict) and "item" in row}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
