"""Seeds of samples, and the length of a run."""

from __future__ import annotations

from geo_pretrain.training.data.samples.sampler import sample_seed, total_steps
from geo_pretrain.training.recipe import AugmentSpec

NO_AUGMENT = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=0)


def test_seeds_of_neighbors_differ():
    seeds = {sample_seed(s, e, i) for s in range(4) for e in range(20) for i in range(-1, 50)}
    assert len(seeds) == 4 * 20 * 51
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_length_of_a_run():
    assert total_steps(840_000, 64, 5, None) == 65625  # methods.md 5.1: about 65.6k
    assert total_steps(10, 64, 1, None) == 1
    assert total_steps(10, 64, None, 7) == 7
