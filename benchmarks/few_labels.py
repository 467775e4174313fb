"""Segmentation of rooms with few labels, from scratch and from pre-trained weights, every rate for every start.

    python -m benchmarks.few_labels OUT [--start NAME|FOLDER ...] [--jobs 2] [--steps 400] [--decoder]
    python -m benchmarks.few_labels OUT --pilot     # first: what the budget reaches with all labels, and the hours
    python -m benchmarks.few_labels OUT --table     # in between: what is there
    python -m benchmarks.few_labels OUT --rate 0.3 --earlier JSON   # a stored table with one rate more
    python -m benchmarks.few_labels OUT --start FOLDER --earlier JSON --result NAME   # its random weights, other starts

Pri3D's U-Net, 200 labelled rooms of four images at 120x160, 12 classes; 1, 5, 25 and 100 % of the rooms. Rates are
chosen on 32 rooms, mIoU is reported on 32 others. Starts are all catalog names with an image encoder that load without
a network, or those given, each compared with those before it; of each encoder there is a start from random weights.
`--decoder` adds each start with its decoder, Pri3D's own protocol. Writes benchmarks/results/few_labels.json and
docs/few_labels.png, or those of another name, when all is done, and the same into OUT at any time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import write_results
from benchmarks.jobs import parser_of, run_jobs, work
from benchmarks.starts import (
    Start,
    Study,
    draw,
    encoder_of,
    estimate,
    fine_tuning_jobs,
    markdown,
    pilot,
    points_of,
    provenance,
    results_of,
    scores_of,
    with_earlier,
)
from geo_pretrain import hub
from geo_pretrain.catalog import find, list_backbones
from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.files import parse_json
from geo_pretrain.hub.cache import names_here
from geo_pretrain.training.networks import SCRATCH

NAME, TITLE = "few_labels", "Segmentation of rooms never seen, few labels"
DOCS = Path(__file__).parents[1] / "docs"
SHARES, RATES = (0.01, 0.05, 0.25, 1.0), (0.01, 0.03, 0.1)
ROOMS = (
    "data.size=[120,160]",
    "data.options={scenes: 200, frames: 4, labelled: 4, val_scenes: 32, width: 160, height: 120, renderer: auto, "
    "classes: coarse}",
)
OTHER_ROOMS = {"seed": 1}  # of the generator: rooms that neither training nor the choice of a rate has seen
BUDGET = ("optim.batch=8", "evaluate.every_steps=null", "precision=auto", "save_every=100")


def starts_of(names: Sequence[str], *, decoder: bool = False) -> tuple[Start, ...]:
    """The starts of these names and folders, after random weights of each encoder; each has those before it as rivals.

    `decoder`: those that have one are there a second time, with it. Raises `RecipeError` without a name or with two
    checkpoints of one name, `CheckpointError` for networks on points.
    """
    if not names:
        raise RecipeError("No catalog name with an image encoder loads here without a network; give --start FOLDER.")
    random: dict[str, Start] = {}
    found: dict[str, Start] = {}
    for name in names:
        network, settings = encoder_of(name)
        baseline = f"{network} from scratch"
        random.setdefault(baseline, Start(baseline, SCRATCH, baseline, settings))
        opened = find(name) or hub.open(name)
        if opened.name in found:
            raise RecipeError(f"Two starts are called {opened.name!r}: {found[opened.name].backbone} and {name}.")
        rivals = tuple(
            start.label for start in found.values() if (start.baseline, start.settings) == (baseline, settings)
        )
        found[opened.name] = Start(opened.name, name, baseline, settings, rivals=rivals)
        if decoder and opened.arch.has_decoder:
            label = f"{opened.name}, with its decoder"
            found[label] = Start(label, name, baseline, (*settings, "network.transfer=all"))
    return (*random.values(), *found.values())


def offline_names() -> list[str]:
    """Catalog names with an image encoder that load here without a network."""
    here = names_here()
    return [name for name in list_backbones(modality="2d") if name in here]


def study_of(starts: tuple[Start, ...], steps: int, seeds: int, rates: Sequence[float] = RATES) -> Study:
    """The whole plan."""
    settings = (*ROOMS, *BUDGET, f"optim.steps={steps}")
    return Study(NAME, "rooms_unet_r18", settings, starts, SHARES, tuple(rates), tuple(range(seeds)), OTHER_ROOMS)


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of(__doc__)
    parser.add_argument("--start", action="append", default=[], help="a catalog name or a checkpoint folder")
    parser.add_argument("--decoder", action="store_true", help="each start with its decoder, too")
    parser.add_argument(
        "--earlier", type=Path, help="few_labels.json of another folder, whose rates and runs count here"
    )
    parser.add_argument("--result", default=NAME, help="the name of the stored table and curve")
    options = parser.parse_args(given)
    starts = starts_of(options.start or offline_names(), decoder=options.decoder)
    options.out.mkdir(parents=True, exist_ok=True)
    whole = study_of(starts, options.steps, options.seeds, options.rate or RATES)
    earlier = read_earlier(options.earlier, options.out) if options.earlier else None

    def planned() -> Study:
        if earlier is None:
            return whole
        return with_earlier(whole, earlier, provenance(whole, options.out)["weights"])

    study = pilot(whole) if options.pilot else planned()
    if options.worker:
        work(fine_tuning_jobs(study, options.out), partial(print, flush=True))
        return
    code = 0 if options.table else run_jobs("benchmarks.few_labels", given, options.jobs)
    if not options.pilot:
        study = planned()  # once more: now the digests of what was run are known
    results = results_of(study, options.out)
    print(markdown(results))
    if options.pilot:
        print(estimate(whole, results))
    else:
        keep(study, options.out, results, earlier, name=options.result)
    sys.exit(abs(code))


def read_earlier(path: Path, out: Path) -> dict[str, Any]:
    """Read a stored table. Raises `DataError` for the one that this run writes: unfinished seeds are not in it."""
    if path.resolve() == (out / f"{NAME}.json").resolve():
        raise DataError(f"{path} is written by this run; runs of {out} count without --earlier.")
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is no table of fine-tuned starts.")
    return found


def keep(
    study: Study, out: Path, results: dict[str, Any], earlier: dict[str, Any] | None = None, *, name: str = NAME
) -> None:
    """Write results and curve into `out`; those of all runs into the repository, too, under `name`.

    `earlier`: see `with_earlier`.
    """
    points = points_of(study, scores_of(study, out))
    facts = provenance(study, out)
    if earlier is not None:
        told = ("command", "machine", "code", "libraries", "learning rates", "runs", "earlier")
        facts["weights"] = {**earlier["weights"], **facts["weights"]}
        facts["earlier"] = {key: earlier[key] for key in told if key in earlier}
    (out / f"{NAME}.md").write_text(markdown(results))
    (out / f"{NAME}.json").write_text(json.dumps({**facts, **results}, indent=2) + "\n")
    if points:
        draw(study, points, out / f"{NAME}.png", title=TITLE)
    if results["runs"][0] == study.runs():
        labels = [start.label for start in study.starts if start.label != start.baseline and "," not in start.label]
        words = [*(f"--start {label}" for label in labels), *(f"--rate {rate:g}" for rate in study.rates)]
        words += [f"--steps {results['steps']}", *([] if name == NAME else [f"--result {name}"])]
        command = " ".join(["python -m benchmarks.few_labels OUT", *words])
        write_results(name, command, {**facts, **results}, timed=False)
        draw(study, points, DOCS / f"{name}.png", title=TITLE)


if __name__ == "__main__":
    main()
