"""Sparse tensors travel: pickles, copies, other devices and types, before and after use."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.sparse import SparseTensor, cat, use
from geo_pretrain.sparse.layers import Conv3d


@pytest.fixture(scope="module")
def net() -> SRUNet:
    torch.manual_seed(0)
    return SRUNet(width=8, in_chans=3, out_chans=4).eval()


def voxels(count: int = 300) -> SparseTensor:
    generator = torch.Generator().manual_seed(1)
    coords = torch.randint(0, 20, (count, 4), generator=generator) * torch.tensor([0, 1, 1, 1])
    coords = torch.cat([coords, coords[:5]])  # duplicates: `inverse` travels too
    return SparseTensor(coords.int(), torch.rand(len(coords), 3, generator=generator))


def by_torch(x: SparseTensor) -> SparseTensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    loaded: SparseTensor = torch.load(file, weights_only=False)
    return loaded


WAYS = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch": by_torch,
    "detach": lambda x: x.detach(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", x.dtype),
}


def assert_same(one: SparseTensor, other: SparseTensor) -> None:
    assert torch.equal(one.coords, other.coords)
    assert torch.equal(one.feats, other.feats)
    assert (one.stride, one.dtype, one.batch_size) == (other.stride, other.dtype, other.batch_size)
    assert (one.inverse is None) == (other.inverse is None)
    assert one.inverse is None or torch.equal(one.inverse, other.inverse)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ["plain", "auto"])
def test_used_tensors_and_their_results_travel(way: str, engine: str, net: SRUNet):
    with use(engine), torch.no_grad():
        x = voxels()
        maps = net.pyramid(x)
        for one in (x, *maps):
            assert_same(WAYS[way](one), one)
        assert torch.equal(net(WAYS[way](x)).feats, net(x).feats)
        coarse = WAYS[way](maps[-1])  # layers go on from it as they would have
        assert coarse.stride == 16
        weight = Conv3d(coarse.feats.shape[1], 4, 3)
        assert torch.equal(weight(coarse).feats, weight(maps[-1]).feats)


def test_after_a_training_step(net: SRUNet):
    x = voxels()
    y = copy.deepcopy(net).train()(x)
    y.feats.sum().backward()
    assert_same(pickle.loads(pickle.dumps(x)), x)
    assert y.feats.requires_grad
    assert not y.detach().feats.requires_grad
    assert_same(copy.deepcopy(y.detach()), y.detach())
    assert_same(pickle.loads(pickle.dumps(y)), y)


def test_a_pickle_holds_no_kernel_maps(net: SRUNet):
    x = voxels()
    with torch.no_grad():
        net(x)
    assert len(pickle.dumps(x)) < 60_000  # voxels of five strides and their parents; the kernel maps are ten times that


def test_types_and_devices():
    x = voxels()
    half = x.to(torch.float16)
    assert x.to(torch.ones(1, dtype=torch.float16)).dtype == x.to(half).dtype == torch.float16
    assert half.dtype == half.feats.dtype == torch.float16
    assert torch.equal(half.feats, x.feats.half())
    assert torch.equal(half.to(dtype=torch.float32).feats, x.feats.half().float())
    assert x.to("cpu") is x
    assert x.device == torch.device("cpu")
    assert torch.equal(cat(half.to(torch.float32), x).feats[:, 3:], x.feats)  # still the same voxels
    with pytest.raises(ValueError, match="floating point types"):
        x.to(torch.int64)


def test_tensors_that_belong_together_do_so_on_another_device():
    """The meta device stands for a GPU: objects are shared as there, numbers are none."""
    x = voxels()
    y = x.with_feats(x.feats * 2)
    a, b = x.to("meta"), y.to("meta")
    assert a.coordinate_manager is b.coordinate_manager
    assert a.device.type == a.inverse.device.type == a.coordinate_map.coords.device.type == "meta"
    assert a.computed_feats.shape == x.computed_feats.shape
    assert x.coordinate_manager.to(torch.device("cpu")) is x.coordinate_manager


def test_workers_send_them():
    from torch.utils.data import DataLoader

    def collate(items: list[Tensor]) -> SparseTensor:
        return voxels(50)

    [received] = DataLoader([torch.zeros(1)], 1, num_workers=1, collate_fn=collate)
    assert_same(received, voxels(50))
