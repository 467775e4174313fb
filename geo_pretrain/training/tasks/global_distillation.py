"""Three baselines of PPKT that distill a frozen image network's global output into a whole cloud.

Global KD: the classes of an image classifier (Hinton et al., 2015). Gupta et al. (CVPR 2016): its pooled features, by
distance. CRD (Tian et al., ICLR 2020): pooled features, by contrast. PPKT (Liu et al., 2021) names them with few
details: what is pooled, and what the paper leaves open, stands beside the settings. Only the encoder of the sparse
U-Net is taught; its decoder is frozen and keeps its random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import encoder_maps
from geo_pretrain.errors import DataError
from geo_pretrain.sparse.functional import global_pool
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.checks import Checks, Count, Momentum, Positive
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.sampler import Samples
from geo_pretrain.training.distributed import World
from geo_pretrain.training.losses.contrastive import queue_nce
from geo_pretrain.training.losses.distillation import crd_loss, crd_scores, kl_distillation, l2_distillation
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import Batch
from geo_pretrain.training.tasks.taught import TaughtByImages, TaughtConfig
from geo_pretrain.training.tasks.teachers import Teacher, load_classifier

TEMPERATURES = {"kd": 1.0, "l2": 1.0, "crd": 0.07}
DECODER = ("convtr", "bntr", "block5", "block6", "block7", "block8", "final")  # how an `SRUNet`'s modules begin


@dataclass(frozen=True)
class Config(TaughtConfig):
    """Settings of the task. Pooling is the mean over the teacher's last map and over the student's coarsest voxels."""

    loss: Literal["kd", "l2", "crd"] = "kd"  # set by the task's name
    temperature: Positive | None = None  # None: 1 for kd (PPKT names none), 0.07 for crd
    # kd: the classes of the teacher's classifier, which "imagenet" has; or, of any teacher, its pooled channels taken
    # as classes (not in any paper: for teachers without a classifier)
    targets: Literal["classifier", "features"] = "classifier"
    # l2: what distance is, see losses.distillation; the recipe takes "mean", for "squared" diverges at its rate
    form: Literal["squared", "norm", "mean"] = "squared"
    dim: Count = 128  # crd: channels that both sides are projected to
    # crd: against a queue of earlier images, as in MoCo, or CRD's released memory of all images with its estimation
    negatives: Literal["queue", "memory"] = "queue"
    queue: Count = 16384  # rows of the queue; drawn from the memory for each image
    memory: Count | None = None  # rows of the memory: the number of frames
    memory_momentum: Momentum = 0.5

    def check_settings(self, check: Checks) -> None:
        if self.loss == "crd" and self.negatives == "memory":
            check(bool(self.memory), "task.memory", self.memory, "the number of frames")

    def unused(self) -> dict[str, str]:
        unused = super().unused()
        if self.loss != "kd":
            unused["targets"] = "global_kd"
        if self.loss == "l2":
            unused["temperature"] = "global_kd and crd"
        else:
            unused["form"] = "gupta"
        if self.loss != "crd":
            unused |= dict.fromkeys(("dim", "negatives", "queue"), "crd")
        if self.loss != "crd" or self.negatives == "queue":
            unused |= dict.fromkeys(("memory", "memory_momentum"), "crd with negatives 'memory'")
        return unused


class GlobalDistillation(TaughtByImages):
    """Compares one feature of a whole cloud with one of its image.

    Heads: `head.*` of the student, and for crd `key.*` of the teacher.

    The student's decoder never runs. It is frozen: with gradients of 0, weight decay would shrink it to nothing.
    """

    config_type = Config
    config: Config
    queue: Tensor  # [K, dim], and where the next row goes
    pointer: Tensor
    memory_student: Tensor  # [M, dim], a row an image
    memory_teacher: Tensor

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe, config)
        self.temperature = config.temperature or TEMPERATURES[config.loss]
        self.negatives = "queue" if config.loss == "crd" else ""
        self.same_in_any_world = config.loss != "crd"  # one micro-batch may see the keys of the one before
        for name, module in self.backbone.named_children():
            module.requires_grad_(not name.startswith(DECODER))
        channels = self.backbone.planes[3]
        if config.loss == "crd":
            self.head = nn.Linear(channels, config.dim)
            self.key = nn.Linear(self.teacher.out_chans, config.dim)
            self._add_negatives()
        else:
            known = self.classifier
            self.head = nn.Linear(channels, self.teacher.out_chans if known is None else known.out_features)

    def find_teacher(self) -> Teacher:
        """Load the teacher and, where its classes are the targets, its classifier."""
        self.classifier: nn.Linear | None = None
        if self.config.loss == "kd" and self.config.targets == "classifier":
            teacher, self.classifier = load_classifier(self.config.teacher, self.config.teacher_encoder)
            self.classifier.requires_grad_(False)
            return teacher
        return super().find_teacher()

    def _add_negatives(self) -> None:
        config = self.config
        if config.negatives == "queue":
            self.register_buffer("queue", F.normalize(torch.randn(config.queue, config.dim), dim=1))
            self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
            return
        for name in ("memory_student", "memory_teacher"):
            self.register_buffer(name, F.normalize(torch.randn(config.memory or 1, config.dim), dim=1))
        for name in ("constant_student", "constant_teacher"):
            self.register_buffer(name, torch.tensor(-1.0))  # set by the first batch

    def dataset(self, source: Source, pairs: list[Pair]) -> Samples:
        """Single frames; the memory must have a row for each."""
        if self.config.negatives == "memory" and self.config.loss == "crd" and len(pairs) > (self.config.memory or 0):
            raise DataError(
                f"'task.memory' is {self.config.memory}, but source {source.name!r} has {len(pairs)} frames; "
                f"accepted: --set task.memory={len(pairs)}."
            )
        return super().dataset(source, pairs)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch of `FrameCloudSamples`, a scalar under the loss's name."""
        image = self.teacher_maps(batch).mean(dim=(2, 3))
        with self.autocast(image.device):
            coarsest = encoder_maps(self.backbone, SparseTensor(batch["coords"], batch["feats"]))[-1]
        student = self.head(global_pool(coarsest.with_sorted_feats(coarsest.sorted_feats.float())))
        if self.config.loss == "kd":
            logits = image if self.classifier is None else self.classifier(image)
            loss = kl_distillation(student, logits, temperature=self.temperature)
        elif self.config.loss == "l2":
            loss = l2_distillation(student, image, form=self.config.form)
        elif self.config.negatives == "queue":
            loss = self._against_queue(F.normalize(student, dim=1), F.normalize(self.key(image), dim=1))
        else:
            loss = self._against_memory(batch, F.normalize(student, dim=1), F.normalize(self.key(image), dim=1))
        return {self.config.loss: loss}

    def _against_queue(self, student: Tensor, teacher: Tensor) -> Tensor:
        # A copy: the backward pass must find what the forward pass has seen.
        loss = queue_nce(student, teacher, self.queue.clone(), temperature=self.temperature)
        if self.training:
            keys = World.current(teacher.device).all_gather(teacher.detach())[: len(self.queue)]
            rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue[rows] = keys
            self.pointer = (self.pointer + len(keys)) % len(self.queue)
        return loss

    def _against_memory(self, batch: Batch, student: Tensor, teacher: Tensor) -> Tensor:
        """CRD's released loss: the features of each side against the memory of the other side."""
        index, memory = batch["index"], self.memory_student
        draws = [
            torch.randint(len(memory), (self.config.queue,), generator=torch.Generator().manual_seed(seed))
            for seed in batch["seed"]
        ]
        rows = torch.cat([index[:, None], torch.stack(draws).to(index.device)], dim=1)
        loss = self.memory_loss(student, teacher, rows)
        if self.training:
            world = World.current(index.device)
            self.remember(*(world.all_gather(rows) for rows in (index, student.detach(), teacher.detach())))
        return loss

    def remember(self, index: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Move rows `index`, int64 [N], of both memories towards new features [N, dim]."""
        for bank, key in ((self.memory_student, student), (self.memory_teacher, teacher)):
            mixed = self.config.memory_momentum * bank[index] + (1 - self.config.memory_momentum) * key
            bank[index] = F.normalize(mixed, dim=1)

    def memory_loss(self, student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
        """Both sides of CRD's loss for unit features [N, dim] and memory rows int64 [N, K + 1], the true pair first.

        The first call sets the normalization constants.
        """
        total = student.new_zeros(())
        sides = (("student", student, self.memory_teacher), ("teacher", teacher, self.memory_student))
        for side, anchors, memory in sides:
            scores = crd_scores(anchors, memory.clone(), rows, self.temperature)
            constant = getattr(self, f"constant_{side}")
            if float(constant) < 0:
                constant.fill_(float(scores.detach().mean()) * len(memory))
            total = total + crd_loss(scores, constant, len(memory))
        return total
