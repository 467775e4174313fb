"""`info`: every label is understood as it stands, numbers have units, addresses are not cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from geo_pretrain.cards.facts import entry_sections, folder_sections, loaded_section, size_text
from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.entry import METRICS, File, Result
from geo_pretrain.fitting import LoadReport
from tests.zoo import write_tiny_3d


def text_of(sections, width=80):
    return "\n".join(line for section in sections for line in (section.title, section.note, *section.lines(width)))


def test_every_number_and_file_of_an_entry_is_there_with_what_it_means():
    for entry in CATALOG.values():
        sections = {section.title: section for section in entry_sections(entry, entry.how)}
        whole = text_of(sections.values(), 400)
        shown = {row[:4] for row in sections["Reported results"].rows} if entry.results else set()
        assert shown == {(r.task, r.dataset, r.metric, f"{r.value:g}") for r in entry.results}
        if entry.results:
            meanings = dict(sections["What these names mean"].rows)
            assert all(meanings[result.metric] == METRICS[result.metric] for result in entry.results)
            tables = {label for key in meanings for label in key.split(", ")}
            assert {result.table for result in entry.results} <= tables
        for text in (entry.arch.title, entry.paper.url, entry.license.weights, *(f.url for f in entry.authors_files)):
            assert text in whole
        assert "pretrained=False" in whole


def test_numbers_measured_here_stand_apart():
    ours = Result("dense matching", "kitchen", "recall at 4 px (%)", 41.5, "a.json", "random: 23.5")
    files = tuple(File(role, f"{role}.safetensors", 1, "0" * 64, ("package:p",)) for role in ("encoder", "decoder"))
    entry = replace(CATALOG["pri3d_view_r18.rooms"], status="published-here", files=files, measured=(ours,))
    sections = {section.title: section for section in entry_sections(entry, entry.how)}
    assert "Reported results" not in sections
    assert sections["Measured results"].rows[0] == (
        "dense matching, kitchen",
        "41.5 recall at 4 px (%); random: 23.5; from a.json",
    )


def test_lines_fit_a_terminal_and_cut_no_address():
    for name in ("pri3d_view_geo_r50", "csc_60k_srunet34", "slidr_srunet34.nuscenes"):
        text = text_of(entry_sections(CATALOG[name], "download"))
        for section in entry_sections(CATALOG[name], "download"):
            assert all(len(line) <= 80 or "://" in line for line in section.lines(80))
        assert CATALOG[name].authors_files[0].url in text
    assert "semantic segmentation                    ScanNet  mIoU    61.7   39.1    T1" in text_of(
        entry_sections(CATALOG["pri3d_view_geo_r50"], "download")
    )


def test_sizes_and_lengths_have_units(tmp_path: Path):
    assert [size_text(size) for size in (980, 99_000, 100_000, 94_000_000)] == [
        "1.0 kB",
        "99.0 kB",
        "0.1 MB",
        "94.0 MB",
    ]
    made = {
        "seconds": 97.7,
        "data": {"source": "rooms", "pairs": 863},
        "libraries": {"torch": "2.6"},
        "own_key": [1, 2],
        "finetuned": {"contract": {"kind": "image"}, "last": {"details": {"confusion": [[0, 1]]}}, "score": 0.5},
    }
    checkpoint = write_tiny_3d(tmp_path / "tiny", provenance=made)
    rows = dict(row for section in folder_sections(checkpoint) for row in section.rows)
    assert rows["training time in seconds"] == "97.7"
    assert (rows["data"], rows["pairs of frames"], rows["version of torch"]) == ("rooms", "863", "2.6")
    assert (rows["own key"], rows["score on the validation data"]) == ("1, 2", "0.5")
    assert rows["voxel edge"].endswith(" cm")
    assert rows["model.safetensors"].startswith("weights of the network, ")
    assert not any("confusion" in key or key.startswith("kind") for key in rows)


def test_a_load_report_names_tensors():
    report = LoadReport(9, ("head.weight",), (), ("conv1.weight",), 0.9)
    rows = dict(loaded_section(report, "here").rows)
    assert rows["coverage"] == "90% of the network's tensors came from the files"
    assert (rows["newly initialized"], rows["in the files, not used"]) == ("head.weight", "none")
