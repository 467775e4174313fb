"""The sparse U-Net against golden values of the released code, and its way from points to features and back."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import VoxelContract
from geo_pretrain.loading import load_backbone, load_pair
from geo_pretrain.sparse import SparseTensor, use
from geo_pretrain.sparse.layers import Conv3d, ConvTranspose3d

DATA = Path(__file__).resolve().parents[1] / "data"
SMALL = {
    "": {"planes": (8, 12, 16, 24, 24, 16, 12, 12), "layers": (2, 3, 4, 6, 2, 2, 2, 2)},
    "unet18.": {"planes": (8, 8, 16, 16, 16, 16, 8, 8), "layers": (2,) * 8},
}
ONES = VoxelContract(0.05)
COLOR = VoxelContract(0.05, ("R", "G", "B"), offset=-0.5)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "srunet_small.safetensors")


@pytest.fixture(params=["plain", "fast"])
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "fast" and importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")
    with use(request.param):
        yield


def golden_network(golden: dict[str, Tensor], which: str = "", **changes: bool) -> SRUNet:
    network = SRUNet(width=8, bn_momentum=0.05, **SMALL[which], **changes)
    prefix = f"{which}state_dict."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})
    return network


def relative(value: Tensor | None, expected: Tensor) -> float:
    assert value is not None
    assert value.shape == expected.shape
    return float((value.detach() - expected).abs().max() / expected.abs().max())


def sparse(golden: dict[str, Tensor]) -> SparseTensor:
    return SparseTensor(golden["coords"], golden["feats"])


def by_coordinate(coords: Tensor, feats: Tensor) -> tuple[Tensor, Tensor]:
    """Both sorted by (batch, x, y, z)."""
    order = torch.arange(len(coords))
    for column in (3, 2, 1, 0):
        order = order[torch.sort(coords[order, column], stable=True).indices]
    return coords[order], feats[order]


# --- the released code's numbers


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("which", "grads", "buffers"), [("", 12, 13), ("unet18.", 7, 11)])
@pytest.mark.parametrize(("mode", "out_limit", "grad_limit"), [("eval", 1e-5, 5e-5), ("train", 5e-5, 2e-4)])
def test_outputs_gradients_and_buffers_equal_the_released_code(
    golden: dict[str, Tensor], which: str, grads: int, buffers: int, mode: str, out_limit: float, grad_limit: float
):
    network = golden_network(golden, which).train(mode == "train")
    feats = golden["feats"].clone().requires_grad_()
    out = network(SparseTensor(golden["coords"], feats)).feats
    loss = (out * golden["loss_weight"]).sum() / len(out)
    loss.backward()
    prefix = f"{which}{mode}."
    assert relative(out, golden[f"{prefix}out"]) < out_limit
    assert abs(float(loss.detach() - golden[f"{prefix}loss"].squeeze())) < 1e-5
    assert relative(feats.grad, golden[f"{prefix}grad_input"]) < grad_limit
    parameters = dict(network.named_parameters())
    names = [k.removeprefix(f"{prefix}grad.") for k in golden if k.startswith(f"{prefix}grad.")]
    assert len(names) == grads
    for name in names:
        assert relative(parameters[name].grad, golden[f"{prefix}grad.{name}"]) < grad_limit, name
    if mode == "train":
        after = [k for k in golden if k.startswith(f"{which}train.after.")]
        assert len(after) == buffers
        for key in after:
            value = network.state_dict()[key.removeprefix(f"{which}train.after.")].float()
            assert relative(value, golden[key].float()) < 1e-5, key


@torch.no_grad()
@pytest.mark.usefixtures("engine")
def test_maps_of_every_block_equal_the_released_code(golden: dict[str, Tensor]):
    network = golden_network(golden).eval()
    seen: dict[str, SparseTensor] = {}
    for number in range(1, 8):
        block = network.get_submodule(f"block{number}")
        block.register_forward_hook(lambda _, __, out, name=f"block{number}": seen.__setitem__(name, out))
    maps = network.pyramid(sparse(golden))
    for name, out in seen.items():
        coords, feats = by_coordinate(out.coords, out.feats)
        expected = by_coordinate(golden[f"inter.{name}.coords"], golden[f"inter.{name}.feats"])
        assert torch.equal(coords, expected[0])
        assert relative(feats, expected[1]) < 1e-5, name
    assert [seen[name] for name in ("block7", "block6", "block5", "block4")] == maps[1:]


@pytest.mark.usefixtures("engine")
def test_normalized_descriptors_equal_the_released_code(golden: dict[str, Tensor]):
    network = golden_network(golden, normalize=True).eval()
    feats = golden["feats"].clone().requires_grad_()
    out = network(SparseTensor(golden["coords"], feats)).feats
    loss = (out * golden["loss_weight"]).sum() / len(out)
    loss.backward()
    assert relative(out, golden["normalized.eval.out"]) < 1e-5
    assert abs(float(loss.detach() - golden["normalized.eval.loss"].squeeze())) < 1e-5
    assert relative(feats.grad, golden["normalized.eval.grad_input"]) < 5e-5
    assert relative(network.final.kernel.grad, golden["normalized.eval.grad.final.kernel"]) < 5e-5


# --- names, shapes, sizes, starts


@pytest.mark.parametrize(
    ("manifest", "arguments"),
    [
        ("pointcontrast_res16unet34c", {}),
        ("csc_res16unet34c", {}),
        ("slidr_minkunet", {"in_chans": 1, "out_chans": 64}),
        ("pri3d_resunet3d", {"stem_kernel": 5, "out_chans": 96}),
    ],
)
def test_names_and_shapes_equal_the_published_checkpoints(manifest: str, arguments: dict[str, int]):
    stored = json.loads((DATA / f"{manifest}.json").read_text())
    with torch.device("meta"):
        network = SRUNet("34C", **arguments)
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == stored["keys"]
    assert list(network.state_dict()) == list(stored["keys"])
    assert sum(p.numel() for p in network.parameters()) == stored["num_params"]


@pytest.mark.parametrize(
    ("variant", "out_chans", "total"),
    [
        ("34C", 32, 37_847_808),
        ("34C", 13, 37_845_965),
        ("34C", 20, 37_846_644),
        ("34C", 256, 37_869_536),
        ("18A", 32, 15_484_928),
        ("18B", 32, 17_196_800),
        ("18C", 32, 21_696_000),
    ],
)
def test_parameter_totals_are_those_known(variant: str, out_chans: int, total: int):
    with torch.device("meta"):
        network = SRUNet(variant, out_chans=out_chans)
    assert sum(p.numel() for p in network.parameters()) == total


def test_width_scales_every_layer():
    with torch.device("meta"):
        full, half = SRUNet(out_chans=8, in_chans=4), SRUNet(out_chans=4, in_chans=2, width=16)
    for (name, large), small in zip(full.named_parameters(), half.parameters(), strict=True):
        assert [side if index == 0 and large.ndim == 3 else side // 2 for index, side in enumerate(large.shape)] == (
            list(small.shape) if name != "final.bias" else [0, 4]
        )


def test_norm_momentum_reaches_stem_strided_transposed_and_shortcut_norms_only():
    with torch.device("meta"):
        network = SRUNet(bn_momentum=0.05)
    momenta = {n: m.momentum for n, m in network.named_modules() if isinstance(m, nn.BatchNorm1d)}
    changed = [name for name, momentum in momenta.items() if momentum == 0.05]
    assert (len(momenta), len(changed)) == (62, 16)
    assert not any("norm" in name for name in changed)
    assert all(momenta[name] == 0.1 for name in momenta if name not in changed)


def test_convolutions_start_as_in_minkowskiengine_or_as_in_pri3d():
    torch.manual_seed(0)
    for init in ("me", "kaiming"):
        network = SRUNet(width=16, stem_kernel=5, init=init)
        assert network.conv0p1s1.kernel.shape == (125, 3, 16)
        for name, module in network.named_modules():
            if not isinstance(module, (Conv3d, ConvTranspose3d)):
                continue
            kernel = module.kernel.detach()
            volume, fan_in, fan_out = kernel.shape if kernel.ndim == 3 else (1, *kernel.shape)
            uniform = init == "me" or isinstance(module, ConvTranspose3d)
            bound = 1 / math.sqrt(volume * (fan_out if isinstance(module, ConvTranspose3d) else fan_in))
            expected = bound / math.sqrt(3) if uniform else math.sqrt(2 / (volume * fan_out))
            tolerance = 4 * expected / math.sqrt(2 * kernel.numel())
            assert float(kernel.std()) == pytest.approx(expected, abs=tolerance), name
            assert (float(kernel.abs().max()) <= bound) == uniform or not uniform, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "34D"}, "Unknown SR-UNet variant '34D'; accepted: 34C, 18A, 18B, 18C"),
        ({"width": 0}, "width is 0; accepted: whole numbers"),
        ({"planes": (8, 8)}, r"planes are \(8, 8\).*eight positive numbers"),
        ({"layers": (1,) * 7 + (0,)}, "eight positive numbers"),
        ({"init": "xavier", "width": 1}, "init is 'xavier'; accepted: 'me', 'kaiming'"),
    ],
)
def test_wrong_shapes_are_refused(arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        SRUNet(**arguments)


# --- the pyramid


@torch.no_grad()
def test_forward_intermediates_is_timms_name_for_output_and_pyramid(golden: dict[str, Tensor]):
    network, x = golden_network(golden).eval(), sparse(golden)
    maps = network.pyramid(x)

    def same(ours: list[SparseTensor], theirs: list[SparseTensor]) -> bool:
        return len(ours) == len(theirs) and all(
            torch.equal(a.feats, b.feats) for a, b in zip(ours, theirs, strict=True)
        )

    output, intermediates = network.forward_intermediates(x)
    assert torch.equal(output.feats, network(x).feats)
    assert same(intermediates, maps)
    assert same(network.forward_intermediates(x, indices=2, intermediates_only=True), maps[-2:])
    assert same(network.forward_intermediates(x, indices=(0, 3), intermediates_only=True), [maps[0], maps[3]])


def test_feature_info_describes_the_pyramid(golden: dict[str, Tensor]):
    network = golden_network(golden).eval()
    x = sparse(golden)
    maps = network.pyramid(x)
    assert [info["reduction"] for info in network.feature_info] == [1, 2, 4, 8, 16]
    assert [info["num_chs"] for info in network.feature_info] == [12, 12, 16, 24, 24]
    for value, info in zip(maps, network.feature_info, strict=True):
        assert value.stride == info["reduction"]
        assert value.feats.shape[1] == info["num_chs"]
    assert torch.equal(maps[0].coords, golden["coords"])
    assert relative(network.final(maps[0]).feats, golden["eval.out"]) < 1e-5
    with torch.device("meta"):
        assert [info["num_chs"] for info in SRUNet().feature_info] == [96, 96, 128, 256, 256]


# --- points to features


def cloud(count: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points (m) around the origin, both signs, several in a voxel, and their colors."""
    generator = torch.Generator().manual_seed(seed)
    points = (torch.rand(count, 3, generator=generator) - 0.5) * 1.2
    points = torch.cat([points, points[:50] + 0.001])
    return points, torch.randint(0, 256, (len(points), 3), generator=generator, dtype=torch.uint8)


def tiny(contract: VoxelContract, **changes: object) -> SRUNet:
    torch.manual_seed(1)
    network = SRUNet("18A", width=4, **{"out_chans": 5, **changes}).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):  # fresh ones are identities
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    network.contract = contract
    return network


@torch.no_grad()
@pytest.mark.parametrize("contract", [ONES, COLOR])
def test_every_point_gets_the_rows_of_the_voxels_that_contain_it_slow_twin(contract: VoxelContract):
    network = tiny(contract)
    points, colors = cloud()
    batch = (torch.arange(len(points)) % 3 == 0).long()
    features = colors if contract is COLOR else None
    encoded = network.encode_points(points, features, batch=batch)
    assert encoded.shape == (len(points), 12 + 12 + 16 + 16 + 32)
    first: dict[tuple[int, ...], int] = {}
    for row, point in enumerate(points):
        cell = (int(batch[row]), *(math.floor(float(v)) for v in point / 0.05))
        first.setdefault(cell, row)
    feats = torch.stack([colors[r] / 255 - 0.5 if contract is COLOR else torch.ones(3) for r in first.values()])
    maps = network.pyramid(SparseTensor(torch.tensor(list(first), dtype=torch.int32), feats))
    tables = [
        {tuple(c): f for c, f in zip(m.coords.tolist(), m.feats, strict=True)} | {"stride": m.stride} for m in maps
    ]
    assert len(first) < len(points) - 40  # shared voxels occur
    for row, point in enumerate(points):
        cell = [math.floor(float(v)) for v in point / 0.05]
        expected = [table[int(batch[row]), *(v // s * s for v in cell)] for table in tables for s in [table["stride"]]]
        torch.testing.assert_close(encoded[row], torch.cat(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_final_gives_the_networks_output_and_arrays_are_welcome():
    network = tiny(COLOR, normalize=True)
    points, colors = cloud()
    final = network.encode_points(points, colors, out="final")
    assert final.shape == (len(points), 5)
    torch.testing.assert_close(final.norm(dim=1), torch.ones(len(points)))
    torch.testing.assert_close(network.encode_points(points.numpy(), colors.numpy() / 255, out="final"), final)
    voxels = network.transforms(points, colors)
    torch.testing.assert_close(network(SparseTensor(voxels.coords, voxels.feats)).feats[voxels.inverse], final)
    with pytest.raises(ValueError, match="out is 'all'; accepted: 'pyramid', 'final'"):
        network.encode_points(points, colors, out="all")


@torch.no_grad()
def test_features_move_with_the_points_and_follow_their_order():
    network = tiny(ONES)
    points, _ = cloud()
    points = (points / 0.05).floor() * 0.05 + 0.02  # inside voxels, so that rounding moves no point to another
    encoded = network.encode_points(points)
    moved = network.encode_points(points + torch.tensor([0.8, -1.6, 2.4]))  # multiples of 16 voxels
    torch.testing.assert_close(moved, encoded, rtol=1e-4, atol=1e-5)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(network.encode_points(points[order]), encoded[order], rtol=1e-4, atol=1e-5)


def test_points_have_gradients_to_the_weights():
    network = tiny(ONES).train()
    network.encode_points(cloud()[0]).sum().backward()
    assert all(p.grad is not None for name, p in network.named_parameters() if not name.startswith("final"))


def test_networks_without_a_contract_cannot_encode_points():
    network = SRUNet("18A", width=4)
    for attempt in (lambda: network.encode_points(torch.zeros(1, 3)), lambda: network.transforms):
        with pytest.raises(RuntimeError, match="built without a contract, so voxel size and features"):
            attempt()


# --- what does not fit


def voxels(feats: Tensor) -> SparseTensor:
    coords = torch.zeros(len(feats), 4, dtype=torch.int32)
    coords[:, 1] = torch.arange(len(feats))
    return SparseTensor(coords, feats)


def test_wrong_inputs_are_refused():
    network = tiny(COLOR)
    with pytest.raises(ValueError, match=r"takes 3 feature channels \(voxels: 5 cm, RGB .*; got 4\. .*in_chans=4"):
        network(voxels(torch.zeros(9, 4)))
    with pytest.raises(TypeError, match=r"Got Tensor \(.*\); accepted: a SparseTensor"):
        network(torch.zeros(9, 3))
    coarse = SparseTensor(torch.tensor([[0, 2, 4, 6]], dtype=torch.int32), torch.zeros(1, 3), stride=2)
    with pytest.raises(ValueError, match="at stride 2; accepted: stride 1"):
        network.pyramid(coarse)


RGB = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize(
    ("contract", "feats", "message"),
    [
        (ONES, RGB, "not constant 1 but span"),
        (ONES, torch.zeros(9, 3), r"span \[0, 0\]"),
        (COLOR, RGB, r"instead of \[-0.5, 0.5\]"),
        (COLOR, RGB * 255, r"instead of \[-0.5, 0.5\]"),
        (COLOR, torch.ones(9, 3), r"span \[1, 1\]"),
        (VoxelContract(0.02, ("R", "G", "B")), RGB - 0.5, r"instead of \[0, 1\]"),
        (VoxelContract(0.02, ("R", "G", "B")), torch.ones(9, 3), "all features given are 1"),
    ],
)
def test_features_of_another_contract_are_noticed_once_at_the_callers_line(
    contract: VoxelContract, feats: Tensor, message: str
):
    for call in (lambda n: n(voxels(feats)), lambda n: n.pyramid(voxels(feats))):
        network = tiny(contract)
        network.name = "my_net"
        with pytest.warns(UserWarning, match=message) as caught:
            call(network)
        assert caught[0].filename == __file__
        assert str(caught[0].message).startswith(f"my_net expects {contract}; ")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(network)


@torch.no_grad()
def test_right_features_and_networks_without_contract_are_quiet():
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(ONES)(voxels(torch.ones(64, 3) + noise))
        tiny(COLOR)(voxels(RGB - 0.5 + noise))
        tiny(VoxelContract(0.02, ("R", "G", "B")))(voxels(RGB))
        SRUNet("18A", width=4).eval()(voxels(RGB * 255))


@pytest.mark.parametrize("decoder", [False, True])
def test_forward_intermediates_of_image_networks_is_timms(decoder):
    network = load_backbone("pri3d_view_r18", pretrained=False, decoder=decoder)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        output, maps = network.forward_intermediates(images)
        encoder = network.encoder if decoder else network
        expected = encoder(images)
        assert torch.equal(output, network(images) if decoder else expected[-1])
        assert all(torch.equal(*both) for both in zip(maps, expected, strict=True))
        (last,) = network.forward_intermediates(images, 1, intermediates_only=True)
        assert torch.equal(last, expected[-1])
        for wrong in ([9], 0, 9, [-9], 1.5, "last", [0.5], [True]):
            with pytest.raises(ValueError, match=r"indices is .*; accepted: None, a number of maps from 1 to 5"):
                network.forward_intermediates(images, wrong)


def test_load_pair_names_the_arguments_it_takes():
    with pytest.raises(
        TypeError,
        match=r"load_pair\(\) got an unexpected keyword argument .in_chans.; accepted: device, dtype, hub, revision",
    ):
        load_pair("ppkt_srunet34", in_chans=4)
