"""Check a folder of wheel projects: digests, sizes, licenses, texts, the catalog's lines, golden outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from geo_pretrain.catalog.shipped import SHIPPED
from geo_pretrain.checkpoint import verify_files
from geo_pretrain.distribution import project as wheel
from geo_pretrain.distribution.measured import check_results
from geo_pretrain.errors import CheckpointError
from geo_pretrain.hub.names import check_published_name


def check_weights(weights: Path | str = "weights", *, golden: bool = True) -> Iterator[str]:
    """Check every checkpoint of every project, and yield a line of each. Raises `CheckpointError` at the first fault.

    `golden=False` leaves out the outputs, which take seconds a network.
    """
    weights = Path(weights)
    if not weights.is_dir():
        raise CheckpointError(f"{weights}: no such folder; accepted: the folder weights/ of a clone.")
    for project in wheel.projects(weights):
        wheel.check_sizes(project)
        for name, text in wheel.texts(project).items():
            if not (project / name).is_file() or (project / name).read_text(encoding="utf-8") != text:
                raise CheckpointError(
                    f"{project / name}: is not what its checkpoints say; `geo-pretrain weights texts` writes it anew."
                )
        for checkpoint in wheel.checkpoints(project):
            verify_files(checkpoint)
            if checkpoint.name not in SHIPPED:
                raise CheckpointError(f"{checkpoint.folder}: the catalog does not list it; add its run again.")
            if SHIPPED[checkpoint.name].package != project.name:
                raise CheckpointError(
                    f"{checkpoint.folder}: the catalog looks for it in {SHIPPED[checkpoint.name].package!r}."
                )
            check_published_name(checkpoint)
            check_results(SHIPPED[checkpoint.name], weights.resolve().parent)
            if checkpoint.license.weights != wheel.LICENSE or not checkpoint.finished:
                raise CheckpointError(f"{checkpoint.folder}: is unfinished, or not under {wheel.LICENSE}.")
            size = f"{wheel.size_of(checkpoint.folder) / wheel.MB:.1f} MB"
            yield f"{project.name}: {checkpoint.name}, {size}, {_golden(checkpoint.folder, golden)}"
    if (weights / "README.md").is_file() and (weights / "README.md").read_text("utf-8") != wheel.overview(weights):
        raise CheckpointError(f"{weights / 'README.md'}: is stale; `geo-pretrain weights texts` writes it anew.")


def _golden(folder: Path, wanted: bool) -> str:
    if not wanted:
        return "digests agree"
    from geo_pretrain.loading import verify

    worst = max(verify(folder, local_files_only=True).errors.values())
    return f"digests agree, golden outputs within {worst:.1g}"
