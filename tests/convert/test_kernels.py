"""Kernel layouts against what the libraries themselves computed, through dense convolution in each library's order.

The truth are outputs of MinkowskiEngine 0.4.3 and 0.5.4 (golden files; coordinates of both signs) and of spconv 2.3.8
(`spconv_reference`). torchsparse needs a GPU to run; its order is that of its own comparison with dense convolution.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.convert import kernels
from geo_pretrain.sparse import SparseTensor
from geo_pretrain.sparse.layers import BatchNorm, Conv3d, ConvTranspose3d
from tests.convert import dense, spconv_reference

DATA = Path(__file__).resolve().parents[1] / "data"
OFFSETS = json.loads((DATA / "kernel_offsets.json").read_text())
HYBRID = [tuple(offset) for offset in OFFSETS["hybrid3_me04"]]
BLOCK = "block3.1.conv2.kernel"


@pytest.fixture(scope="module")
def me_ops() -> dict[str, Tensor]:
    return load_file(DATA / "me_ops.safetensors")


@pytest.fixture(scope="module")
def srunet() -> dict[str, Tensor]:
    return load_file(DATA / "srunet_small.safetensors")


@pytest.fixture(scope="module")
def weights(srunet: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole network's state dict: 374 tensors of the authors' class."""
    return {k.removeprefix("state_dict."): v for k, v in srunet.items() if k.startswith("state_dict.")}


def through(coords: Tensor, name: str, ops: dict[str, Tensor], kernel: Tensor, offsets: dense.Offsets) -> Tensor:
    """The golden operation `name` computed densely with another kernel and order."""
    if name.startswith("convtr"):
        return dense.upsample(ops["coarse_coords"], ops["coarse_feats"], kernel, offsets, ops[f"{name}.out_coords"])
    if name.endswith("s2"):
        return dense.downsample(coords, ops["feats"], kernel, offsets, ops[f"{name}.out_coords"])
    return dense.convolve(coords, ops["feats"], kernel, offsets)


def assert_close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# --- MinkowskiEngine ---


@pytest.mark.parametrize("name, size", [("conv_k3s1", 3), ("conv_k5s1", 5), ("conv_k2s2", 2), ("convtr_k2s2", 2)])
def test_the_dense_reference_with_our_order_is_what_minkowski_engine_computes(me_ops, name, size):
    value = through(me_ops["coords"], name, me_ops, me_ops[f"{name}.kernel"], dense.x_fastest(size))
    assert_close(value, me_ops[f"{name}.out_feats"])


def test_the_hybrid_permutation_is_that_of_the_old_engine(me_ops):
    assert kernels.hybrid_to_cube() == OFFSETS["cube_from_hybrid"]
    assert kernels.hybrid_to_cube() == me_ops["kernel_offsets.k3_hybrid_to_cube_perm"].tolist()


def test_our_kernel_in_hybrid_order_gives_the_same_numbers_with_the_old_engines_offsets(me_ops):
    ours, expected = me_ops["conv_k3s1.kernel"], me_ops["conv_k3s1.out_feats"]
    theirs = kernels.to_me04({BLOCK: ours})[BLOCK]
    assert_close(dense.convolve(me_ops["coords"], me_ops["feats"], theirs, HYBRID), expected)
    unconverted = dense.convolve(me_ops["coords"], me_ops["feats"], ours, HYBRID)
    assert (unconverted - expected).norm() > 0.5 * expected.norm()


def test_a_hybrid_kernel_gives_the_same_numbers_in_our_order(me_ops):
    theirs = torch.randn(27, 4, 3, generator=torch.Generator().manual_seed(1))
    ours = kernels.from_me04({BLOCK: theirs})[BLOCK]
    value = dense.convolve(me_ops["coords"], me_ops["feats"], ours, dense.x_fastest(3))
    assert_close(value, dense.convolve(me_ops["coords"], me_ops["feats"], theirs, HYBRID))


@pytest.mark.parametrize("manifest", ["pointcontrast_res16unet34c", "csc_res16unet34c"])
def test_exactly_the_block_kernels_of_the_manifest_are_reordered(manifest):
    content = json.loads((DATA / f"{manifest}.json").read_text())
    (hybrid,) = (keys for title, keys in content["kernel_layout"].items() if "HYBRID" in title)
    state = {key: torch.arange(27.0).reshape(-1, 1, 1) for key, shape in content["keys"].items() if len(shape) == 3}
    changed = {key for key, value in kernels.from_me04(state).items() if not torch.equal(value, state[key])}
    assert changed == set(hybrid)
    assert len(changed) == 46


@torch.no_grad()
def test_the_old_engines_output_comes_back_when_weights_are_read_as_an_old_checkpoint(srunet, weights):
    """ME 0.4.3 ran the authors' network with these tensors as they are; its block kernels are hybrid then."""
    network = SRUNet(
        "34C", planes=(8, 12, 16, 24, 24, 16, 12, 12), layers=(2, 3, 4, 6, 2, 2, 2, 2), width=8, out_chans=32
    ).eval()
    x = SparseTensor(srunet["coords"], srunet["feats"])
    network.load_state_dict(kernels.from_me04(weights))
    out = network(x).feats
    assert_close(out[:512], srunet["hybrid.eval.out_head"])
    loss = (out * srunet["loss_weight"]).sum() / len(out)
    assert float((loss - srunet["hybrid.eval.loss"]).abs()) < 1e-5


# --- spconv ---


@pytest.fixture(scope="module")
def spconv_ops() -> dict[str, Tensor]:
    return load_file(DATA / "spconv_ops.safetensors")


@pytest.mark.parametrize("columns", ["zyx", "xyz"])
def test_spconvs_weights_give_its_own_numbers_in_our_order(spconv_ops, columns):
    """spconv ran on the columns as they are; they are (z, y, x) or (x, y, z) only by the name one gives them."""

    def ours(coords: Tensor) -> Tensor:
        return coords[:, [0, 3, 2, 1]] if columns == "zyx" else coords

    def kernel(name: str) -> Tensor:
        return kernels.kernel_from_spconv(spconv_ops[f"{name}.weight"], columns)

    coords, feats = ours(spconv_ops["coords"]), spconv_ops["feats"]
    coarse = ours(spconv_ops["down.coords"] * torch.tensor([1, 2, 2, 2], dtype=torch.int32))
    assert_close(dense.convolve(coords, feats, kernel("subm"), dense.x_fastest(3)), spconv_ops["subm.out"])
    down = dense.downsample(coords, feats, kernel("down"), dense.x_fastest(2), coarse)
    assert_close(down, spconv_ops["down.out"])
    up = dense.upsample(coarse, spconv_ops["down.out"], kernel("up"), dense.x_fastest(2), coords)
    assert_close(up, spconv_ops["up.out"])
    assert_close(feats @ kernel("point"), spconv_ops["point.out"])  # which its shape alone would not tell


@pytest.mark.parametrize("name, size", [("conv_k3s1", 3), ("conv_k5s1", 5), ("conv_k2s2", 2), ("convtr_k2s2", 2)])
def test_our_kernel_as_a_spconv_weight_gives_the_same_numbers_on_a_dense_grid(me_ops, name, size):
    weight = kernels.kernel_to_spconv(me_ops[f"{name}.kernel"])
    assert weight.shape[1:4] == (size, size, size)
    offsets = [(x, y, z) for z in dense.steps(size) for y in dense.steps(size) for x in dense.steps(size)]
    slices = torch.stack([weight[:, z, y, x].T for z in range(size) for y in range(size) for x in range(size)])
    assert_close(through(me_ops["coords"], name, me_ops, slices, offsets), me_ops[f"{name}.out_feats"])
    turned = kernels.kernel_to_spconv(me_ops[f"{name}.kernel"], "xyz")
    assert torch.equal(turned.permute(0, 3, 2, 1, 4), weight)


class Small(nn.Module):
    """Every kind of layer of an SR-UNet under the names that our state dict gives them, in spconv's layers."""

    def __init__(self) -> None:
        import spconv.pytorch as spconv

        super().__init__()
        self.replace = lambda x, feats: x.replace_feature(feats)
        self.stem = spconv.SubMConv3d(4, 5, 3, bias=False)
        self.norm = nn.BatchNorm1d(5)
        self.down = spconv.SparseConv3d(5, 6, 2, 2, bias=False, indice_key="d")
        self.up = spconv.SparseInverseConv3d(6, 4, 2, indice_key="d", bias=False)
        self.final = spconv.SubMConv3d(4, 3, 1, bias=True)

    def forward(self, x):
        x = self.stem(x)
        return self.final(self.up(self.down(x.replace_feature(self.norm(x.features)))))


spconv_here = pytest.mark.skipif(
    importlib.util.find_spec("spconv") is None, reason="spconv is not installed; its recorded numbers were compared"
)


@spconv_here
def test_the_recorded_numbers_are_those_of_the_installed_spconv(spconv_ops):
    given = spconv_reference.inputs()
    assert all(torch.equal(value, spconv_ops[key]) for key, value in given.items())
    weights = {key.removesuffix(".weight"): value for key, value in given.items() if key.endswith(".weight")}
    outputs = spconv_reference.layers(given["coords"], given["feats"], weights)
    assert torch.equal(outputs["down.coords"], spconv_ops["down.coords"])
    for name in ("subm", "point", "down", "up"):
        assert_close(outputs[f"{name}.out"], spconv_ops[f"{name}.out"])


@spconv_here
@torch.no_grad()
def test_a_network_of_spconv_layers_takes_our_state_dict_and_agrees(spconv_ops):
    import spconv.pytorch as spconv

    torch.manual_seed(0)
    ours = nn.ModuleDict(
        {
            "stem": Conv3d(4, 5),
            "norm": BatchNorm(5),
            "down": Conv3d(5, 6, kernel_size=2, stride=2),
            "up": ConvTranspose3d(6, 4),
            "final": Conv3d(4, 3, kernel_size=1, bias=True),
        }
    ).eval()
    ours["norm"].bn.running_mean.normal_()
    ours["norm"].bn.running_var.uniform_(0.5, 1.5)
    theirs = Small().eval()
    theirs.load_state_dict(kernels.to_spconv(ours.state_dict()), strict=True)
    coords, feats = spconv_ops["coords"], spconv_ops["feats"]
    x = SparseTensor(coords[:, [0, 3, 2, 1]].contiguous(), feats)
    for layer in ours.values():
        x = layer(x)
    value = theirs(spconv.SparseConvTensor(feats, coords, [6, 6, 8], 2)).features
    assert_close(value, x.feats)
    back = kernels.from_spconv(theirs.state_dict())
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert all(torch.equal(value, back[key]) for key, value in ours.state_dict().items())


# --- torchsparse ---

TORCHSPARSE = {2: dense.z_fastest(2), 3: dense.x_fastest(3), 5: dense.x_fastest(5)}


@pytest.mark.parametrize("name, size", [("conv_k3s1", 3), ("conv_k5s1", 5), ("conv_k2s2", 2), ("convtr_k2s2", 2)])
def test_our_kernel_gives_the_same_numbers_with_torchsparses_offsets(me_ops, name, size):
    theirs = kernels.kernel_to_torchsparse(me_ops[f"{name}.kernel"])
    assert_close(through(me_ops["coords"], name, me_ops, theirs, TORCHSPARSE[size]), me_ops[f"{name}.out_feats"])


@pytest.mark.parametrize("name, size", [("conv_k3s1", 3), ("conv_k2s2", 2), ("convtr_k2s2", 2)])
def test_a_torchsparse_kernel_gives_the_same_numbers_in_our_order(me_ops, name, size):
    theirs = torch.randn(me_ops[f"{name}.kernel"].shape, generator=torch.Generator().manual_seed(2))
    ours = kernels.kernel_from_torchsparse(theirs)
    value = through(me_ops["coords"], name, me_ops, ours, dense.x_fastest(size))
    assert_close(value, through(me_ops["coords"], name, me_ops, theirs, TORCHSPARSE[size]))


# --- whole state dicts ---

THERE_AND_BACK = {
    "ME 0.4": (kernels.to_me04, kernels.from_me04),
    "spconv": (kernels.to_spconv, kernels.from_spconv),
    "spconv xyz": (lambda s: kernels.to_spconv(s, columns="xyz"), lambda s: kernels.from_spconv(s, columns="xyz")),
    "torchsparse": (kernels.to_torchsparse, kernels.from_torchsparse),
}


@pytest.mark.parametrize("library", THERE_AND_BACK)
def test_there_and_back_changes_nothing_and_back_and_there_neither(weights, library):
    there, back = THERE_AND_BACK[library]
    theirs = there(weights)
    returned = back(theirs)
    assert list(returned) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in returned.items())
    again = there(returned)
    assert list(again) == list(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in again.items())
    moved = [key for key, value in theirs.items() if key not in weights or not torch.equal(value, weights[key])]
    assert len(moved) > 40
    assert all(value.is_contiguous() for value in theirs.values())


def test_names_and_shapes_are_those_of_the_other_libraries_layers(weights):
    spconv = kernels.to_spconv(weights)
    torchsparse = kernels.to_torchsparse(weights)
    assert not any(".bn." in key for key in [*spconv, *torchsparse])
    assert spconv["conv0p1s1.weight"].shape == (8, 3, 3, 3, 3)
    assert spconv["final.weight"].shape == (32, 1, 1, 1, 12)
    assert spconv["final.bias"].shape == torchsparse["final.bias"].shape == (32,)
    assert spconv["block2.0.downsample.1.running_var"].shape == (12,)
    assert torchsparse["conv0p1s1.kernel"].shape == (27, 3, 8)
    assert torchsparse["final.kernel"].shape == (12, 32)


def test_tensors_that_are_no_layer_of_the_engine_keep_their_names():
    state = {"w3d.weight": torch.ones(64, 96), "w3d.bias": torch.ones(64)}
    for there, back in THERE_AND_BACK.values():
        assert list(there(state)) == list(back(state)) == list(state)
        assert there(state)["w3d.bias"].shape == back(state)["w3d.bias"].shape == (64,)


def test_meta_tensors_are_enough():
    state = {BLOCK: torch.empty(27, 3, 5, device="meta"), "up.kernel": torch.empty(8, 3, 5, device="meta")}
    assert kernels.to_me04(state)[BLOCK].shape == (27, 3, 5)
    assert kernels.to_spconv(state)["up.weight"].shape == (5, 2, 2, 2, 3)
    assert kernels.to_torchsparse(state)["up.kernel"].shape == (8, 3, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kernels.from_me04({BLOCK: torch.ones(8, 2, 3)}), r"'block3.1.conv2.kernel' is \[8, 2, 3\]; accepted"),
        (
            lambda: kernels.to_me04({f"module.{BLOCK}": torch.ones(27, 2, 3)}),
            r"'module\.block3.* have a prefix; accepted",
        ),
        (lambda: kernels.to_spconv({"a.kernel": torch.ones(9, 2, 3)}), r"kernel is \[9, 2, 3\]; accepted: \[K\*K\*K"),
        (lambda: kernels.from_spconv({"a.weight": torch.ones(3, 3, 2, 3, 4)}), r"accepted: \[Cout, K, K, K, Cin\]"),
        (lambda: kernels.kernel_from_spconv(torch.ones(27, 2, 3)), r"weight is \[27, 2, 3\]; accepted"),
        (lambda: kernels.kernel_to_spconv(torch.ones(8, 2, 3), "xzy"), "columns is 'xzy'; accepted: 'zyx', 'xyz'"),
        (lambda: kernels.to_torchsparse({"a.kernel": torch.ones(64, 2, 3)}), "size 4: torchsparse places even windows"),
    ],
)
def test_kernels_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
