"""Convolutions of enlarged maps at the small size: against enlarging first, and where the plain way is taken."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fusion, parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from geo_pretrain.backbones import enlarged, resnet_unet
from geo_pretrain.backbones.enlarged import convolve_enlarged, pays, stands_for
from geo_pretrain.backbones.resnet_unet import ResNetUNet, UpProjection
from tests.backbones import test_resnet_unet as released

CASES = {  # images, channels in and out, taps, small size, large size
    "double": (3, 6, 4, 5, (7, 9), (14, 18)),
    "odd, wide": (2, 5, 3, 5, (8, 23), (15, 47)),
    "three taps": (2, 4, 3, 3, (5, 6), (11, 9)),
    "one tap": (2, 4, 3, 1, (5, 6), (10, 12)),
    "as large": (2, 4, 3, 5, (6, 7), (6, 7)),
    "smaller": (2, 4, 3, 5, (12, 11), (5, 4)),
    "from a pixel": (2, 4, 3, 5, (1, 1), (2, 3)),
    "to a pixel": (2, 4, 3, 5, (3, 2), (1, 1)),
    "a row": (1, 4, 3, 5, (1, 20), (1, 40)),
    "no image": (0, 4, 3, 5, (3, 4), (6, 8)),
}


def plain(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """What every other program computes."""
    enlarged_map = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    return F.conv2d(enlarged_map, weight, padding=weight.shape[-1] // 2)


def leaves(case: str, dtype: torch.dtype = torch.float64, layout: torch.memory_format = torch.contiguous_format):
    batch, in_chans, out_chans, taps, small, size = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(batch, in_chans, *small, dtype=dtype)
    weight = torch.randn(out_chans, in_chans, taps, taps, dtype=dtype)
    return [tensor.to(memory_format=layout).requires_grad_() for tensor in (x, weight)], size


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The small way wherever it is right, though these networks are too narrow for it; what it was called for."""
    calls: list[tuple[int, ...]] = []

    def spy(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
        calls.append(tuple(weight.shape))
        return convolve_enlarged(x, weight, size)

    monkeypatch.setattr(enlarged, "_costs_less", lambda *_: True)
    monkeypatch.setattr(resnet_unet, "convolve_enlarged", spy)
    return calls


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_enlarging_first(case: str, layout: torch.memory_format):
    tensors, size = leaves(case, layout=layout)
    value, expected = convolve_enlarged(*tensors, size), plain(*tensors, size)
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(value, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("largest", [1, 3000, 1 << 21])
def test_parts_that_are_held_together_change_nothing(monkeypatch: pytest.MonkeyPatch, largest: int):
    monkeypatch.setattr(enlarged, "LARGEST", largest)
    tensors, size = leaves("odd, wide")
    value, expected = convolve_enlarged(*tensors, size), plain(*tensors, size)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(value.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_images_and_stripes_cover_every_row_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(enlarged, "LARGEST", 2000)
    shape = enlarged.Shape((6, 5), (12, 10), 5)
    rows, images = [], []
    for some, stripes in enlarged._parts(7, torch.empty(4, 3, 5, 5), shape):
        images += range(7)[some]
        for held, stripe in stripes:
            assert stripe.stop - stripe.start == held.stop - held.start > 0
            assert (stripe.stop - stripe.start) * 5 * 25 * 4 <= 2000
            rows += range(stripe.start, stripe.stop)
    assert images == list(range(7))
    assert rows == list(range(7 * 6))


class Sizes(TorchDispatchMode):
    """The number of values of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [one for one in (out if isinstance(out, list | tuple) else [out]) if isinstance(one, Tensor)]
        self.largest = max([self.largest, *(one.untyped_storage().nbytes() // one.element_size() for one in made)])
        return out


def test_no_more_is_held_than_stated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(enlarged, "LARGEST", 4000)
    x, weight = torch.randn(9, 2, 6, 8, requires_grad=True), torch.randn(4, 2, 5, 5, requires_grad=True)
    out = convolve_enlarged(x, weight, (12, 16))
    grad, stated = torch.ones_like(out), max(4000, weight.numel(), 5 * 4 * 6 * 16, out.numel())
    assert 2 * stated < 9 * 6 * 8 * 25 * 4  # all products at once
    with Sizes() as sizes:
        torch.autograd.grad(convolve_enlarged(x, weight, (12, 16)), (x, weight), grad)
    assert 0 < sizes.largest <= stated


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_weight_or_input_gets_no_gradient(frozen: int):
    tensors, size = leaves("double")
    tensors[frozen].requires_grad_(False)
    value, expected = convolve_enlarged(*tensors, size), plain(*tensors, size)
    trained = tensors[1 - frozen]
    mine, theirs = (torch.autograd.grad(one.square().sum(), trained)[0] for one in (value, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_second_derivatives():
    tensors, size = leaves("three taps")
    assert torch.autograd.gradgradcheck(lambda *both: convolve_enlarged(*both, size), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_low_precision_is_as_close_as_the_plain_way(dtype: torch.dtype, layout: torch.memory_format):
    torch.manual_seed(1)
    x, weight = torch.randn(2, 64, 9, 11), torch.randn(32, 64, 5, 5) / 40
    exact = plain(x.double(), weight.double(), (18, 22))
    rounded = [tensor.to(dtype, memory_format=layout) for tensor in (x, weight)]
    low, expected = convolve_enlarged(*rounded, (18, 22)), plain(*rounded, (18, 22))
    assert low.dtype == expected.dtype == dtype
    assert relative(low, exact) < 1.5 * relative(expected, exact)


def test_autocast_computes_in_its_precision_and_keeps_float32_gradients():
    torch.manual_seed(1)
    tensors = [torch.randn(2, 64, 9, 11, requires_grad=True), (torch.randn(32, 64, 5, 5) / 40).requires_grad_()]
    exact = plain(*[tensor.double() for tensor in tensors], (18, 22))
    with torch.autocast("cpu", torch.bfloat16):
        value = convolve_enlarged(*tensors, (18, 22))
    assert value.dtype == torch.bfloat16
    assert relative(value, exact) < 0.01
    ours = torch.autograd.grad(value.float().square().sum(), tensors)
    for mine, theirs in zip(ours, torch.autograd.grad(exact.square().sum(), tensors), strict=True):
        assert mine.dtype == torch.float32
        assert relative(mine, theirs) < 0.02


def test_what_inference_kept_serves_training():
    enlarged._both_bands.cache_clear()
    tensors, size = leaves("odd, wide", torch.float32)
    with torch.inference_mode(), torch.device("meta"):
        convolve_enlarged(*(tensor.detach() for tensor in tensors), size)
    value = convolve_enlarged(*tensors, size)
    torch.testing.assert_close(value, plain(*tensors, size), rtol=1e-5, atol=1e-4)
    value.sum().backward()
    assert all(tensor.grad is not None for tensor in tensors)


def test_gradients_have_the_layout_of_weights():
    tensors, size = leaves("double", layout=torch.channels_last)
    convolve_enlarged(*tensors, size).sum().backward()
    assert tensors[1].grad.is_contiguous(memory_format=torch.channels_last)


def test_only_the_small_map_and_the_weight_are_kept_for_the_backward_pass():
    tensors, size = leaves("double")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        convolve_enlarged(*tensors, size)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize(
    ("images", "channels", "small", "size", "quicker"),
    [
        (1, 512, (8, 10), (15, 20), True),  # R18 at 240x320
        (8, 128, (30, 40), (60, 80), True),
        (1, 2048, (8, 10), (15, 20), True),  # R50
        (1, 512, (2, 3), (4, 6), False),  # reordering the weights is more than what they are for
        (8, 32, (30, 40), (60, 80), False),  # enlarging all taps is more than multiplying them
        (8, 512, (15, 20), (15, 20), False),  # nothing is enlarged
    ],
)
def test_the_rule_goes_by_sizes(images: int, channels: int, small, size, quicker: bool):
    x, weight = torch.empty(images, channels, *small), torch.empty(1, channels, 5, 5)
    assert pays(x, weight, size) is quicker


def test_the_rule_leaves_other_devices_types_and_recorded_calls_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(enlarged, "_costs_less", lambda *_: True)
    x, weight = torch.rand(1, 4, 3, 3), torch.rand(4, 4, 5, 5)
    assert pays(x, weight, (6, 6))
    assert not pays(x.to("meta"), weight.to("meta"), (6, 6))
    assert not pays(x[:0], weight, (6, 6))
    assert not pays(nn.Buffer(x).as_subclass(type("Own", (Tensor,), {})), weight, (6, 6))
    assert not pays(x.bfloat16(), weight, (6, 6))  # conv2d says what is wrong
    with torch.autocast("cpu", torch.bfloat16):
        assert pays(x.bfloat16(), weight, (6, 6))
    asked = []
    torch.func.vmap(lambda one: asked.append(pays(one[None], weight, (6, 6))) or one)(x)
    torch.func.grad(lambda one: asked.append(pays(one, weight, (6, 6))) or one.sum())(x)
    with torch.autograd.forward_ad.dual_level():
        asked.append(pays(x, weight, (6, 6)))
    assert asked == [False] * 3


class Adapted(nn.Module):
    """A convolution beside a low-rank one, as LoRA replaces it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.low = nn.Conv2d(conv.in_channels, 2, 1)
        self.high = nn.Conv2d(2, conv.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.high(self.low(x))


def changed(how: str) -> UpProjection:
    torch.manual_seed(0)
    up = UpProjection(8, 4).eval()
    nn.init.normal_(up.bn1.running_mean)
    conv = up.conv1
    if how == "adapted":
        up.conv1 = Adapted(conv)
    elif how == "parametrized":
        parametrizations.spectral_norm(conv)
    elif how == "pruned":
        prune.random_unstructured(conv, "weight", amount=0.5)
    elif how == "folded":
        up.conv1, up.bn1 = fusion.fuse_conv_bn_eval(conv, up.bn1), nn.Identity()
    elif how == "dilated":
        conv.dilation, conv.padding = (2, 2), (4, 4)
    elif how == "reflecting":
        up.conv1 = nn.Conv2d(8, 4, 5, padding=2, bias=False, padding_mode="reflect")
    elif how == "own forward":
        forward = conv.forward
        conv.forward = lambda x: 2 * forward(x)
    elif how == "hooked":
        conv.register_forward_hook(lambda module, inputs, out: 3 * out)
    return up.eval()


@pytest.mark.parametrize(
    "how", ["adapted", "parametrized", "pruned", "folded", "dilated", "reflecting", "own forward", "hooked"]
)
def test_a_convolution_that_is_more_than_its_weight_takes_the_plain_way(how: str, always: list[tuple[int, ...]]):
    up = changed(how)
    assert not stands_for(up.conv1)
    assert stands_for(up.conv2)
    x = torch.randn(2, 8, 5, 6)
    large = F.interpolate(x, size=(9, 13), mode="bilinear", align_corners=True)
    branch = up.bn1_2(up.conv1_2(F.relu(up.bn1(up.conv1(large)))))
    expected = F.relu(branch + up.bn2(up.conv2(large)))
    torch.testing.assert_close(up(x, (9, 13)), expected, rtol=0, atol=0)
    assert not always


def test_hooks_of_all_modules_see_the_convolutions(always: list[tuple[int, ...]]):
    seen: list[nn.Module] = []
    up = changed("nothing")
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, out: seen.append(module))
    try:
        up(torch.randn(1, 8, 5, 6), (9, 13))
    finally:
        handle.remove()
    assert up.conv1 in seen
    assert not always


@pytest.fixture
def network() -> ResNetUNet:
    torch.manual_seed(0)
    return ResNetUNet(18, width=8, out_chans=5).eval()


def test_the_whole_network_both_ways(network: ResNetUNet, always: list[tuple[int, ...]]):
    images = torch.rand(2, 3, 72, 104)
    value = network(images)
    assert len(always) == 8
    for conv in network.decoder.modules():
        conv.register_forward_pre_hook(lambda module, inputs: None)
    expected = network(images)
    assert len(always) == 8
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mode", "limit"), [("eval", 1e-5), ("train", 1e-4)])
def test_the_released_code_agrees(always: list[tuple[int, ...]], mode: str, limit: float):
    golden = load_file(released.DATA / "res_unet2d_small.safetensors")
    released.test_outputs_gradients_and_buffers_equal_the_released_code(golden, mode, limit)
    assert len(always) == 8


def test_traced_and_exported_networks_hold_plain_operations_for_any_size(network: ResNetUNet, always):
    images, other, odd = torch.rand(1, 3, 64, 96), torch.rand(2, 3, 80, 64), torch.rand(1, 3, 65, 95)
    expected, expected_other, expected_odd = network(images), network(other), network(odd)
    always.clear()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(network, images, check_trace=False)  # the check is a call like any other
    scripted = torch.fx.symbolic_trace(network)
    exported = torch.export.export(network, (other,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    assert not always
    torch.testing.assert_close(traced(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(traced(odd), expected_odd, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported(other), expected_other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scripted(other), expected_other, rtol=1e-4, atol=1e-5)
    assert "decoder.up1.conv1" in {node.target for node in scripted.graph.nodes}  # as feature extractors name it
    assert not always


def test_compiled_networks_are_not_changed(network: ResNetUNet, always):
    images = torch.rand(1, 3, 64, 96)
    expected = network(images)
    always.clear()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
    assert not always


def test_torch_func_and_forward_mode(network: ResNetUNet, always):
    images = torch.rand(2, 3, 64, 64)
    expected = network(images)
    always.clear()
    one_by_one = torch.func.vmap(lambda one: network.decoder([m[None] for m in one])[0])
    maps = network.encoder(images)[1:]
    torch.testing.assert_close(one_by_one(maps), expected, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(network, (images,), (torch.ones_like(images),))
    with torch.autograd.forward_ad.dual_level():
        dual = network(torch.autograd.forward_ad.make_dual(images, torch.ones_like(images)))
        _, direct = torch.autograd.forward_ad.unpack_dual(dual)
    torch.testing.assert_close(direct, tangent, rtol=1e-4, atol=1e-5)
    assert not always


def test_copies_and_lower_precision(network: ResNetUNet, always):
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = network(images)
        for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(copied(images), expected)
        for dtype in (torch.bfloat16, torch.float16):
            always.clear()
            low = copy.deepcopy(network).to(dtype)(images.to(dtype))
            assert len(always) == 8
            assert low.dtype == dtype
            assert relative(low, expected) < 0.05
