"""Card sections about a checkpoint: method, paper, reported and measured results, license, citation."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from geo_pretrain.backbones.architectures import Arch
from geo_pretrain.cards.front_matter import license_page
from geo_pretrain.cards.markdown import table
from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.entry import Entry, License, Paper, Result

ARXIV = re.compile(r"https?://arxiv\.org/abs/([\w.-]+/?\w*)")


def summary(arch: Arch, data: str, description: str) -> str:
    """The sentence under a card's title."""
    kind = "images" if arch.modality == "2d" else "point clouds"
    what = f": {description}" if description else ""
    return f"{arch.title} for {kind}, pre-trained on {data}{what}."


def method_of(name: str) -> str | None:
    """The method that a checkpoint's name begins with, when the catalog knows it."""
    methods = {entry.method for entry in CATALOG.values()}
    return max((method for method in methods if name.startswith(f"{method}_")), key=len, default=None)


def paper_of_method(name: str) -> Paper | None:
    """Look up the paper of a name: its entry's paper, or the paper of any entry with the same method."""
    method = method_of(name)
    papers = (entry.paper for entry in CATALOG.values() if entry.method == method)
    return CATALOG[name].paper if name in CATALOG else next(papers, None)


def _paper_link(paper: Paper | None) -> str:
    """A Markdown link to a paper with venue and year; "" without one."""
    return "" if paper is None else f"[{paper.title}]({paper.url}) ({paper.venue} {paper.year})"


def facts_table(arch: Arch, data: str, paper: Paper | None, more: Mapping[str, str]) -> str:
    """The table of network, pre-training data, method and `more` facts; empty ones are left out."""
    facts = {"network": f"{arch.title}, `{arch}`", "pre-training data": data, "method": _paper_link(paper), **more}
    return table(("what", "value"), [(key, value) for key, value in facts.items() if value])


def is_authors_own(entry: Entry, provenance: Mapping[str, Any]) -> bool:
    """Whether the folder was converted from a file that the catalog lists: the same address or the same bytes."""
    source = provenance.get("source")
    if not isinstance(source, Mapping) or "converted_by" not in provenance:
        return False
    known = {file.url for file in entry.authors_files} | {file.sha256 for file in entry.authors_files if file.sha256}
    return bool({source.get("url"), source.get("sha256")} & known)


def papers_of(entry: Entry) -> dict[str, Paper]:
    """The paper behind each table of the results: "T1" is one of the entry's own, "Pri3D T1" one of that method's."""
    by_method = {other.method: other.paper for other in CATALOG.values()}
    return {r.table: by_method.get(r.table.split()[0].lower(), entry.paper) for r in entry.results}


def measured_section(results: Sequence[Result]) -> list[str]:
    """The section of results measured with this project; empty without any."""
    return ["## Measured", "With this project, on these weights.", _results(results)] if results else []


def reported_section(results: Sequence[Result], papers: Mapping[str, Paper], whose: str) -> list[str]:
    """The section of the authors' results; `papers` maps each table to its paper, `whose` names the weights."""
    if not results:
        return []
    cited = {papers[result.table].title: papers[result.table] for result in results}
    sources = " and ".join(_paper_link(paper) for paper in cited.values())
    text = (
        f"Numbers of networks that started from {whose}, as stated by {sources}: T is a table of a paper, README that "
        "of its repository. Not one of them was measured with this project."
    )
    return ["## Reported by the authors", text, _results(results)]


def _results(results: Iterable[Result]) -> str:
    rows = [(r.task, r.dataset, r.metric, f"{r.value:g}", r.table) for r in results]
    return table(("task", "data", "metric", "value", "from"), rows)


def license_section(license: License) -> str:
    """The section that states the license chain."""
    rows = [("the weights", _terms(license.weights)), ("the code that made them", _terms(license.code))]
    rows += [(f"data: {name}", _terms(terms)) for name, terms in license.datasets]
    return "## License\n\n" + table(("of", "license"), [*rows, ("started from", license.base_model)])


def _terms(identifier: str) -> str:
    page = license_page(identifier)
    return identifier if page is None else f"[{identifier}]({page})"


def citation_section(paper: Paper | None) -> str:
    """The section that cites a paper; "" without one."""
    if paper is None:
        return ""
    names = f"{paper.authors}: *{paper.title}*. {paper.venue} {paper.year}. <{paper.url}>"
    return f"## Citation\n\n{names}\n\n```bibtex\n{bibtex(paper)}\n```"


def bibtex(paper: Paper) -> str:
    """A BibTeX entry; its key is surname, year and first word of the title."""
    first = paper.authors.split(",")[0].split()[-1]
    key = _ascii_word(first) + str(paper.year) + _ascii_word(re.split(r"[\s:,-]", paper.title, maxsplit=1)[0])
    number = ARXIV.match(paper.url)
    fields = {
        "title": f"{{{paper.title}}}",
        "author": " and ".join(name.strip() for name in paper.authors.split(",")),
        "year": str(paper.year),
        "url": paper.url,
    }
    if paper.venue.lower().startswith("arxiv"):
        kind = "misc"
        fields |= {"eprint": number[1], "archiveprefix": "arXiv"} if number else {"howpublished": paper.venue}
    else:
        kind = "inproceedings"
        fields["booktitle"] = paper.venue
    lines = [f"  {field} = {{{text.replace('&', chr(92) + '&')}}}," for field, text in fields.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


def _ascii_word(text: str) -> str:
    folded = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", folded)
