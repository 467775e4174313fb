"""`recommend`: the question in, checkpoints with reasons out, and honest words where the answer lies elsewhere."""

from __future__ import annotations

import textwrap
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from geo_pretrain.advice.questions import ANY, INPUTS, LIDAR, Question, license_words
from geo_pretrain.advice.ranking import DEPTH, OFFERED, Pick, candidates, is_reported, picks
from geo_pretrain.catalog.alternatives import ALTERNATIVES, Alternative
from geo_pretrain.catalog.entry import HOW, Entry
from geo_pretrain.hub.cache import names_here

WIDTH = 80
CAPTIONS = {"2d": "networks for images", "3d": "networks for point clouds"}
SHOWN = ("CLI", "Python", "timm", "smp", "torchvision")  # lines that are printed; JSON has all
PAGE = "docs/alternatives.md"
OUTSIDE = f"Outside this zoo, newer and often better ({PAGE}):"
ELSEWHERE = f"The better answer is likely outside this zoo ({PAGE}):"


@dataclass(frozen=True, repr=False)
class Recommendation:
    """Checkpoints for a question, best first, what to know about them, and backbones outside this zoo.

    Printed, it is the text that `geo-pretrain recommend` shows.
    """

    question: Question
    picks: tuple[Pick, ...]
    notes: tuple[str, ...]
    outside: tuple[Alternative, ...]
    outside_first: bool  # nothing here can be had, or no paper reports the task for anything here

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return str(self)  # a notebook shows what the command prints

    def __str__(self) -> str:
        asked = self.question
        words = f"{asked.task} from {INPUTS[asked.input].words}, license: {asked.license}"
        here = []
        for modality in dict.fromkeys(pick.modality for pick in self.picks):
            chosen = [pick for pick in self.picks if pick.modality == modality]
            if len(asked.modalities) > 1:
                here.append(f"With {CAPTIONS[modality]}:")
            here += [_pick_text(number, pick) for number, pick in enumerate(chosen, 1)]
            here.append(_lines_text(chosen[0]))
        title = ELSEWHERE if self.outside_first else OUTSIDE
        outside = ["\n".join([title, *map(_outside_text, self.outside)])] if self.outside else []
        blocks = [*outside, *(["In this zoo:"] if here else []), *here] if self.outside_first else [*here, *outside]
        return "\n\n".join([words, *(_wrapped(note) for note in self.notes), *blocks])


def recommend(
    task: str,
    input: str = "rgb",
    *,
    license: str = ANY,
    like: str | None = None,
    network: str = "",
    offline: bool = False,
    limit: int = 3,
    here: Collection[str] | None = None,
) -> Recommendation:
    """Recommend checkpoints for a task, derived from reported numbers, contracts, licenses and status of the catalog.

    Args:
        task: what comes out: segmentation, instances, detection, classification, parts, matching or depth.
        input: what goes in: rgb, rgb-d, depth, points, colored-points or lidar.
        license: of the weights: "any", "permissive", "non-commercial" (permissive ones, too) or an SPDX identifier.
        like: the benchmark whose data is most like yours, such as "Cityscapes"; default: the most reported one.
        network: a part of the network's title, such as "ResNet-18": its size and speed follow from it.
        offline: only what loads on this machine without a network.
        limit: how many, for each kind of network.
        here: names that load on this machine without a network; default: they are looked for.

    Raises `UnknownName` for a word that is none of these, with those that are.

    >>> answer = recommend("segmentation", "points", like="ScanNet", here=())
    >>> answer.picks[0].name, answer.picks[0].why
    ('pointcontrast_nce_srunet34', '74.1 mIoU on ScanNet (random start 72.2)')
    """
    question = Question(task, input, license, like, network)
    found = names_here() if here is None else here
    chosen = tuple(p for m in question.modalities for p in picks(question, m, found, max(limit, 1), offline))
    outside = [a for a in ALTERNATIVES if _is_alternative(a, question)]
    outside.sort(key=lambda a: task not in a.tasks)  # made for this very task before made for all
    notes = _notes(question, found, offline)
    if any(pick.how == HOW["published-by-authors"] for pick in chosen):
        notes.append(
            "Whether the authors' links still answer: `geo-pretrain pull --check NAME`. Where there is no network, "
            "gp.load_backbone(NAME, pretrained=False) builds the network with random weights."
        )
    if not outside and license != ANY:
        notes.append(f"Outside this zoo we know of no weights for it under {question.terms} either.")
    offered = any(_is_offered(e, found) for m in question.modalities for e in candidates(question, m, found))
    reported = any(is_reported(task, modality) for modality in question.modalities)
    return Recommendation(question, chosen, tuple(notes), tuple(outside), bool(outside) and not (offered and reported))


def _is_alternative(other: Alternative, question: Question) -> bool:
    fits = other.modality in question.modalities and (not other.tasks or question.task in other.tasks)
    return fits and question.allows(other.license) and (question.input != LIDAR or other.lidar)


def _notes(question: Question, here: Collection[str], offline: bool) -> list[str]:
    """What to know before the first choice is taken."""
    fitting = [e for m in question.modalities for e in candidates(question, m, here)]
    notes = []
    if not fitting:
        notes.append(f"This zoo has nothing for it under {question.terms}.")
    elif offline and not any(e.name in here for e in fitting):
        notes.append(
            "None of them loads here without a network. `geo-pretrain pull NAME` fetches one where there is one; "
            "gp.load_backbone(NAME, pretrained=False) builds its network with random weights."
        )
    elif not any(_is_offered(e, here) for e in fitting):
        notes.append(
            f"No weights for it can be had under {question.terms}. What follows are recipes: you train, on "
            "rooms or on a recording of yours, and nobody has measured what comes of it."
        )
        others = _under_other_terms(question, here)
        if others:
            terms = license_words(others[0].license.weights)
            notes.append(f"Under other terms {others[0].name} can be had: {terms}.")
    if not any(is_reported(question.task, modality) for modality in question.modalities):
        notes.append(f"No paper reports {question.task} for any weights here.")
    if question.task == DEPTH:
        notes.append("No network here gives depth maps as it is: it needs a head, which you train on its features.")
    return notes


def _is_offered(entry: Entry, here: Collection[str]) -> bool:
    return entry.name in here or entry.status in OFFERED


def _under_other_terms(question: Question, here: Collection[str]) -> list[Entry]:
    """What could be had if the license did not matter."""
    wider = Question(question.task, question.input, ANY, question.like, question.network)
    return [e for m in wider.modalities for e in candidates(wider, m, here) if _is_offered(e, here)]


def _pick_text(number: int, pick: Pick) -> str:
    facts = {"why": pick.why, "get it": pick.how, "license": license_words(pick.license)}
    lines = [f"{number}. {pick.name}: {pick.network}, pre-trained on {pick.data}"]
    return "\n".join([*lines, *(f"   {key + ':':<8} {value}" for key, value in facts.items())])


def _lines_text(pick: Pick) -> str:
    """The lines to paste for a pick; commands that make its weights come first, those that use it last."""
    order = [host for host in SHOWN if host in pick.lines]
    blocks = [f"# {host}\n{pick.lines[host]}" for host in order]
    blocks += ["\n".join(["# and then", *pick.next])] if pick.next else []
    return f"To paste for {pick.name}:\n\n" + textwrap.indent("\n\n".join(blocks), "    ")


def _outside_text(other: Alternative) -> str:
    lines = [f"- {other.name}, {license_words(other.license)}:", f"    {other.what}", f"    {other.url}"]
    return "\n".join([*lines, *([f"    {other.code}"] if other.code else [])])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
