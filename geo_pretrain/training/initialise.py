"""Where an encoder starts: ImageNet, MoCo v2, random weights, or a checkpoint of this zoo."""

from __future__ import annotations

from torch import nn

from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.errors import GeoPretrainError, WeightsMismatch
from geo_pretrain.loading import load_backbone
from geo_pretrain.training.recipe import ModelSpec


def initialise_encoder(network: ResNetUNet, spec: ModelSpec) -> None:
    """Put the weights that `spec.init` names into the encoder of `network` (a checkpoint fills its decoder too).

    "imagenet" means torchvision's IMAGENET1K_V1, which all Pri3D encoders started from, never V2. Raises with the
    alternatives when those weights cannot be downloaded.
    """
    if spec.init == "scratch":
        return
    if spec.init == "imagenet":
        _load(network.encoder, _imagenet(spec.depth).state_dict())
        return
    _load(network, load_backbone(spec.init, decoder=True).state_dict())


def _imagenet(depth: int) -> nn.Module:
    import torchvision

    weights = {18: "ResNet18_Weights", 50: "ResNet50_Weights"}[depth]
    enum = getattr(torchvision.models, weights).IMAGENET1K_V1
    try:
        network: nn.Module = getattr(torchvision.models, f"resnet{depth}")(weights=enum)
    except OSError as error:
        raise GeoPretrainError(
            f"init 'imagenet' needs {enum.url}, which could not be downloaded ({error}). "
            "Put the file into torch's hub cache, or start from random weights: --set model.init=scratch."
        ) from error
    network.fc = nn.Identity()
    return network


def _load(network: nn.Module, weights: dict[str, object]) -> None:
    own = network.state_dict()
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [key for key in own.keys() & weights.keys() if own[key].shape != getattr(weights[key], "shape", None)]
    if wrong:
        raise WeightsMismatch(f"The initial weights do not fit: {len(wrong)} keys differ, first {wrong[:3]}.")
    network.load_state_dict(weights)
