"""Settings of detection in clouds: `network.options` of its recipes, and what boxes do not allow in augmentation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from geo_pretrain.training.checks import Accepts, Checks, Count, Meters, Mistakes, Ranged
from geo_pretrain.training.config import parse
from geo_pretrain.training.evaluation.detection3d import PROTOCOLS, BoxFilter
from geo_pretrain.training.finetune.box_coding import TABLE_OF
from geo_pretrain.training.finetune.votenet import Sampling
from geo_pretrain.training.finetune_recipe import FinetuneRecipe

Protocols = Annotated[
    tuple[str, ...],
    Accepts(
        lambda names: 0 < len(names) == len(set(names)) and set(names) <= set(PROTOCOLS),
        f"a list of {', '.join(PROTOCOLS)}",
    ),
]


@dataclass(frozen=True)
class VoteNetOptions(Ranged):
    """`network.options` of a recipe for detection3d; the defaults are the released ones for oriented boxes."""

    section = "network.options."

    heading_bins: Count = 12  # 1: boxes are aligned with the axes, and stay so in augmentation
    # Size templates, one a class: mean or median of the training boxes, or those that were published with the data set
    sizes: Literal["mean", "median", "published"] = "mean"
    # Whom points vote for: instances, as released for ScanNet; boxes that they lie in, as released for SUN RGB-D; auto:
    # instances where the data set has them
    votes: Literal["auto", "instances", "boxes"] = "auto"
    protocols: Protocols = ("training",)  # of evaluation; the first gives the reported scores
    metric: Literal["ap25", "ap50"] = "ap50"  # the score that picks the best evaluation and goes into tables
    # Weights of the last layers of votes and proposals. random: as released; quiet: 0 for votes' moves and for all that
    # proposals say, which spares short runs some hundred steps
    start: Literal["random", "quiet"] = "random"
    seeds: Count = 1024
    proposals: Count = 256
    vote_factor: Count = 1  # votes of a seed
    radius: Meters = 0.3  # of the ball whose votes make a proposal, m
    group: Count = 16  # votes in it
    sampling: Sampling = "vote_fps"  # how proposals are chosen from votes

    def rules(self, *, per_class: bool) -> BoxFilter:
        """The rules of the first protocol, with each box once or once for each class."""
        return replace(PROTOCOLS[self.protocols[0]], per_class=per_class)


def detection3d_options(recipe: FinetuneRecipe) -> VoteNetOptions:
    """Parse `network.options`, and reject settings of clouds that boxes cannot follow. Raises `RecipeError`."""
    check, spec = Checks(), recipe.clouds()
    augment, options = spec.augment, VoteNetOptions()
    try:
        options = parse(VoteNetOptions, recipe.network.options, where="", prefix="network.options.")
    except Mistakes as error:
        check.problems += error.problems
    upright = "0 about x and y: boxes stand upright"
    check(augment.rotate[:2] == (0, 0), "data.cloud.augment.rotate", augment.rotate, upright)
    check(augment.mirror[2] == 0, "data.cloud.augment.mirror", augment.mirror, "0 along z: boxes stand upright")
    for name, accepted in (("elastic", ()), ("crop", None), ("flip_axes", ""), ("scale_axes", False)):
        given = getattr(augment, name)
        check(given == accepted, f"data.cloud.augment.{name}", given, f"{accepted!r}: boxes cannot follow")
    check(spec.normalize == "none", "data.cloud.normalize", spec.normalize, "none: votes are in meters")
    check(spec.bounds is None, "data.cloud.bounds", spec.bounds, "none: all boxes are measured")
    check(spec.labelled_points is None, "data.cloud.labelled_points", spec.labelled_points, "none: labels are boxes")
    known = options.sizes != "published" or recipe.data.source in TABLE_OF
    check(known, "network.options.sizes", options.sizes, f"mean or median; published for {', '.join(TABLE_OF)}")
    check.done()
    return options
