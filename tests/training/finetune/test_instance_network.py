"""SR-UNet with a head of offsets: the released layers, the same outputs as the layers one by one, one transfer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.finetune.instance_network import InstanceSRUNet, instance_srunet, split_output


def voxels(seed=0):
    generator = torch.Generator().manual_seed(seed)
    coords = torch.unique(torch.randint(0, 40, (80, 3), generator=generator), dim=0)
    coords = coords[torch.randperm(len(coords), generator=generator)]
    return SparseTensor(F.pad(coords, (1, 0)).int(), torch.rand(len(coords), 3, generator=generator))


def tiny(seed=0):
    torch.manual_seed(seed)
    return SRUNet("18A", width=4)


def test_layers_are_those_of_the_released_code():
    with torch.device("meta"):
        network = InstanceSRUNet(SRUNet("34C", out_chans=20))
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    heads = {name: shape for name, shape in shapes.items() if not name.startswith("unet.")}
    assert heads == {
        "offsets_pre.kernel": (96, 96), "offsets_pre.bias": (1, 96),
        "bntr_offset.bn.weight": (96,), "bntr_offset.bn.bias": (96,), "bntr_offset.bn.running_mean": (96,),
        "bntr_offset.bn.running_var": (96,), "bntr_offset.bn.num_batches_tracked": (),
        "offsets.kernel": (96, 3), "offsets.bias": (1, 3),
    }  # fmt: skip
    assert shapes["unet.final.kernel"] == (96, 20)
    # the U-Net of ScanNet's 20 classes, and 96 x 96 + 96, 2 x 96, 96 x 3 + 3
    assert sum(parameter.numel() for parameter in network.parameters()) == 37_846_644 + 9_312 + 192 + 291


def test_output_is_logits_and_offsets_of_each_voxel():
    network, x = instance_srunet(tiny(), 5, seed=1), voxels()
    logits, offsets = split_output(network(x).feats)
    assert (logits.shape, offsets.shape) == ((len(x.feats), 5), (len(x.feats), 3))
    torch.testing.assert_close(logits, network.unet(x).feats)
    network.eval()
    features = network.unet.pyramid(x)[0].feats
    hidden = F.relu(network.bntr_offset.bn(features @ network.offsets_pre.kernel + network.offsets_pre.bias))
    slow = hidden @ network.offsets.kernel + network.offsets.bias
    with torch.no_grad():
        torch.testing.assert_close(split_output(network(x).feats)[1], slow)


def test_new_layers_are_the_same_whatever_is_transferred():
    start = tiny(seed=7)
    kept, drawn = (instance_srunet(start, 5, seed=3, transfer=transfer).state_dict() for transfer in (True, False))
    new = {name for name in kept if not name.startswith("unet.") or name.startswith("unet.final.")}
    assert all(torch.equal(kept[name], drawn[name]) for name in new)
    torch.testing.assert_close(kept["unet.block3.0.conv1.kernel"], start.block3[0].conv1.kernel)
    assert not torch.equal(kept["unet.block3.0.conv1.kernel"], drawn["unet.block3.0.conv1.kernel"])
