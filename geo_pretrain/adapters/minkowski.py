"""SR-UNets as MinkowskiEngine 0.5 networks and state dicts.

Names and layouts of our weights are MinkowskiEngine's own, so `state_dict` is all that a network of its examples
(MinkUNet34C) or of the authors' code, ported to 0.5, needs. What is built here was tested against the engine's recorded
numbers with stand-ins for its layers, not with the engine itself, which today's PyTorch cannot install.
"""

from __future__ import annotations

import copy
import os
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from geo_pretrain.backbones.sr_unet import SRUNet, finished_maps
from geo_pretrain.errors import MissingDependency, require
from geo_pretrain.loading import load_backbone
from geo_pretrain.sparse.layers import BatchNorm, Conv3d, ConvTranspose3d, ReLU

INSTALL = "pip install --no-build-isolation git+https://github.com/NVIDIA/MinkowskiEngine"


def state_dict(model_or_name: SRUNet | str | os.PathLike[str], **load_kwargs: Any) -> dict[str, Tensor]:
    """The weights as a MinkowskiEngine 0.5 state dict: the same names, contiguous copies on the CPU.

    `load_kwargs` are those of `load_backbone` for a name or folder. For networks of MinkowskiEngine 0.4 pass the
    result through `geo_pretrain.convert.kernels.to_me04`.
    """
    model = _sr_unet(model_or_name, load_kwargs)
    return {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}


def me_network(model_or_name: SRUNet | str | os.PathLike[str], **load_kwargs: Any) -> nn.Module:
    """A network of MinkowskiEngine layers with our structure and weights: ME SparseTensor in, ME SparseTensor out.

    It has the mode, device and dtype of our network and carries `contract`, `load_report` and, where there is a
    contract, `transforms`, whose voxels are its input: `ME.SparseTensor(voxels.feats, coordinates=voxels.coords)`.
    Raises `MissingDependency` where MinkowskiEngine cannot be imported.
    """
    _engine()  # before anything is loaded
    model = _sr_unet(model_or_name, load_kwargs)
    network = MinkowskiSRUNet(model)
    network.load_state_dict(state_dict(model), strict=True)
    weight = model.final.kernel
    return network.to(weight.device, weight.dtype).train(model.training)


class MinkowskiSRUNet(nn.Module):
    """The layers of an `SRUNet` as MinkowskiEngine's; weights are freshly drawn until a state dict is loaded."""

    final: nn.Module

    def __init__(self, model: SRUNet) -> None:
        super().__init__()
        self.normalize = model.normalize
        self.contract, self.load_report = model.contract, model.load_report
        if model.contract is not None:
            self.transforms = model.transforms
        engine = _engine()
        for name, child in model.named_children():
            self.add_module(name, _translated(engine, child))

    def forward(self, x: Any) -> Any:
        """ME SparseTensor with our network's input channels -> one with its output channels, on the same voxels."""
        engine = _engine()
        x = self.final(finished_maps(self, x, engine.cat)[0])
        if not self.normalize:
            return x
        return engine.SparseTensor(
            F.normalize(x.F, dim=1),
            coordinate_map_key=x.coordinate_map_key,
            coordinate_manager=x.coordinate_manager,
        )


def _translated(engine: ModuleType, module: nn.Module) -> nn.Module:
    """Translate a layer, or all layers of a container, into MinkowskiEngine's."""
    if isinstance(module, Conv3d | ConvTranspose3d):
        transposed = isinstance(module, ConvTranspose3d)
        build = engine.MinkowskiConvolutionTranspose if transposed else engine.MinkowskiConvolution
        return build(
            module.in_chans,
            module.out_chans,
            kernel_size=module.kernel_size,
            stride=module.stride,
            dilation=module.dilation,
            bias=module.bias is not None,
            dimension=3,
        )
    if isinstance(module, BatchNorm):
        return engine.MinkowskiBatchNorm(module.bn.num_features, eps=module.bn.eps, momentum=module.bn.momentum)
    if isinstance(module, ReLU):
        return engine.MinkowskiReLU()
    twin = copy.copy(module)  # its forward only calls its layers and adds
    children = module._modules.items()
    twin._modules = {name: None if child is None else _translated(engine, child) for name, child in children}
    return twin


def _sr_unet(model_or_name: SRUNet | str | os.PathLike[str], load_kwargs: dict[str, Any]) -> SRUNet:
    if isinstance(model_or_name, nn.Module):
        if load_kwargs:
            raise ValueError(f"{', '.join(load_kwargs)}: options of load_backbone, for names and folders only.")
        model: nn.Module = model_or_name
    else:
        model = load_backbone(model_or_name, **load_kwargs)
    if not isinstance(model, SRUNet):
        raise ValueError(f"Got a {type(model).__name__}; accepted: an SRUNet, the name or the folder of one.")
    return model


def _engine() -> ModuleType:
    try:
        return require("MinkowskiEngine", "adapters")
    except MissingDependency as error:
        raise MissingDependency(
            f"This needs the library 'MinkowskiEngine', which is not installed: {INSTALL} "
            "(it has to be compiled and needs an older PyTorch). Our own network needs none of it: load_backbone(name)."
        ) from error
