"""ONNX files: what is written was compared with torch and says what it takes; what cannot be written says why."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from geo_pretrain import loading
from geo_pretrain.adapters import onnx as module
from geo_pretrain.adapters.onnx import export_onnx
from geo_pretrain.backbones.timm_names import timm_contract
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import CheckpointError
from tests.front_door import geo_pretrain
from tests.zoo import ARCH, role_weights, tiny_timm, write_timm, write_tiny, write_tiny_3d

CONTRACT = ImageContract(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0), size=(48, 64))


class Halved(nn.Module):
    """A convolution of stride 2, brought back to the image's size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return F.interpolate(self.conv(x), x.shape[-2:], mode="bilinear", align_corners=True)


def test_a_file_normalizes_takes_any_size_and_gives_labels_from_1(tmp_path, monkeypatch):
    network, path = Halved().eval(), tmp_path / "x.onnx"
    given = {"names": ("logits", "labels"), "classes": tuple("abcd"), "facts": {"license": "MIT"}}
    network.train().conv.eval()  # in the midst of training, with a part that is frozen
    report = export_onnx(network, CONTRACT, path, **given)
    assert (network.training, network.conv.training) == (True, False)
    network.eval()
    assert report.worst < 1e-5
    assert list(report.outputs) == ["logits", "labels"]
    stored = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(stored["classes"]) == list("abcd")
    assert (stored["license"], stored["trained_size"], stored["channels"]) == ("MIT", "48x64", "R, G, B")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    image = torch.rand(1, 3, 33, 45, generator=torch.Generator().manual_seed(1))
    logits, labels = session.run(None, {"images": image.numpy()})
    with torch.no_grad():
        expected = network(CONTRACT.transforms(resize=False)(image)).numpy()
    assert np.allclose(logits, expected, atol=1e-5)
    assert np.array_equal(labels, logits.argmax(1) + 1)
    written = path.read_bytes()
    monkeypatch.setattr(module, "_write", lambda wrapped, to, *shape: to.write_bytes(written))
    network.conv.bias.data += 0.1  # so that the file computes something else
    path.write_bytes(b"as before")
    with pytest.raises(CheckpointError, match="onnxruntime computes something else than torch"):
        export_onnx(network, CONTRACT, path, **given)
    assert path.read_bytes() == b"as before"


def test_a_network_for_points_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_backbone", lambda *args, **more: pytest.fail("it was loaded"))
    ended = geo_pretrain("export", "pointcontrast_nce_srunet34", "--onnx", tmp_path / "x.onnx", expected=1)
    assert "'pointcontrast_nce_srunet34' is a network for clouds; accepted: images. ONNX has no" in ended.errors


def test_maps_of_one_stride_have_names_of_their_own(tmp_path):
    vit = tiny_timm("timm/test_vit", 0)
    write_timm(tmp_path / "mine_vit", "timm/test_vit", vit)
    geo_pretrain("export", tmp_path / "mine_vit", "--onnx", tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == [f"stride16_{k}" for k in range(4)]
    image = torch.rand(1, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = vit.encoder(timm_contract("timm/test_vit").transforms(resize=False)(image))
    for found, expected in zip(session.run(None, {"images": image.numpy()}), maps, strict=True):
        assert np.allclose(found, expected.numpy(), atol=1e-4)


def test_an_encoder_alone_has_no_dense_features(tmp_path):
    write_tiny(tmp_path / "tiny", arch=ARCH.encoder_alone, weights={"encoder": role_weights("encoder")})
    ended = geo_pretrain("export", tmp_path / "tiny", "--decoder", "--onnx", tmp_path / "x.onnx", expected=1)
    assert "holds an encoder alone; drop --decoder" in " ".join(ended.errors.split())


def test_what_cannot_be_written_says_why(tmp_path):
    write_tiny_3d(tmp_path / "tiny_net_srunet34")
    to = str(tmp_path / "x.onnx")
    ended = geo_pretrain("export", str(tmp_path / "tiny_net_srunet34"), "--onnx", to, expected=1)
    assert "ONNX has no sparse convolutions" in ended.errors
    assert "tiny_net_srunet34 --to me05|spconv --out FILE" in ended.errors
    assert "names that end in .onnx" in geo_pretrain("export", "x", "--onnx", "x.pt", expected=2).errors
    assert (
        "no folder"
        in geo_pretrain("export", "x", "--onnx", str(tmp_path / "no" / "such" / "x.onnx"), expected=2).errors
    )
    (tmp_path / "x.onnx").touch()
    assert "exists" in geo_pretrain("export", "x", "--onnx", to, expected=1).errors
