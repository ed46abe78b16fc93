"""The heatmap network: a timm or segmentation-models-pytorch backbone, a decoder and one 1x1 head.

Three families of decoder:

* `branch` - HRNet keeps a stride-4 branch through the whole network; the head reads that branch alone.
* `pyramid` - a plain top-down sum over the feature maps of any timm backbone.
* a class name of segmentation-models-pytorch (`Unet`, `FPN`, ...) over any encoder that library or timm offers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_cli.errors import InputError
from lit_common.weights import first_line, load_weights

GUIDE_NAMES = {"hrnet": "hrnet_w32"}  # what the profiles' original guide called its backbone
BLOCK_NAMES = ("Block", "Bottleneck", "InvertedResidual", "HighResolutionModule")
WAY_OUT = "use --model.pretrained false, or --model.pretrained PATH with a weights file"


class HeatmapNet(nn.Module):
    """One heatmap (or logit map) per landmark.

    Args:
        backbone: A timm model name with feature maps (`hrnet_w32`, `convnext_tiny`, ...) or, with a decoder of
            segmentation-models-pytorch, one of its encoder names (`resnet34`). `hrnet` means `hrnet_w32`.
        decoder: `auto` (`branch` for HRNet, else `pyramid`), `branch`, `pyramid`, or a class of
            segmentation-models-pytorch such as `Unet`.
        num_landmarks: K, the number of output maps.
        in_channels: 1 (grey) or 3 (RGB).
        stride: Input pixels per heatmap pixel: 1, 2 or 4.
        pretrained: `True` downloads the backbone's default weights, a path reads them from a file.
        gradient_checkpointing: Recompute block activations in the backward pass: less memory, about a third more time.
            BatchNorm statistics see each batch twice then, as if their momentum were 0.19 instead of 0.1.

    Shapes:
        input (B, in_channels, H, W) float, H and W multiples of 32; output (B, K, H / stride, W / stride).

    Raises:
        InputError: unknown names, or weights that cannot be had.
    """

    def __init__(
        self,
        *,
        backbone: str = "hrnet_w32",
        decoder: str = "auto",
        num_landmarks: int,
        in_channels: int = 1,
        stride: int = 4,
        pretrained: bool | str = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if stride not in (1, 2, 4):
            raise InputError(f"model.stride: expected 1, 2 or 4, got {stride}")
        backbone = GUIDE_NAMES.get(backbone, backbone)
        if decoder == "auto":
            decoder = "branch" if backbone.startswith("hrnet") else "pyramid"
        self.body: nn.Module
        if decoder == "branch":
            self.body = HighResolutionBranch(backbone, in_channels, pretrained)
        elif decoder == "pyramid":
            self.body = Pyramid(backbone, in_channels, pretrained)
        else:
            self.body = SmpBody(backbone, decoder, in_channels, stride, pretrained)
        self.head = Head(self.body.channels, num_landmarks, self.body.stride, stride)
        if gradient_checkpointing:
            checkpoint_blocks(self.body)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to maps (B, K, H / stride, W / stride)."""
        return self.head(self.body(images))


class HighResolutionBranch(nn.Module):
    """HRNet's stride-4 branch, before the classification modules."""

    stride = 4

    def __init__(self, backbone: str, in_channels: int, pretrained: bool | str) -> None:
        super().__init__()
        if not backbone.startswith("hrnet"):
            raise InputError(f"model.decoder: 'branch' needs an hrnet backbone, got {backbone}; use pyramid or Unet")
        self.net = create_timm(backbone, in_channels, pretrained, feature_location="", out_indices=(1,))
        # Only the first output of the last fusion is read: the others would cost time and get no gradient.
        last = self.net.stage4[-1]
        last.fuse_layers = last.fuse_layers[:1]
        self.channels: int = self.net.feature_info.channels()[0]

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, channels, H / 4, W / 4)."""
        return self.net(images)[0]


class Pyramid(nn.Module):
    """Top-down sum of a backbone's feature maps down to its finest one of stride 4 or more."""

    def __init__(self, backbone: str, in_channels: int, pretrained: bool | str, channels: int = 128) -> None:
        super().__init__()
        self.net = create_timm(backbone, in_channels, pretrained)
        reductions = self.net.feature_info.reduction()
        self.used = [i for i, r in enumerate(reductions) if r >= 4]
        if not self.used:
            raise InputError(
                f"model.backbone: {backbone} has no feature map of stride 4 or more (strides {reductions})"
            )
        widths = self.net.feature_info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(widths[i], channels, 1) for i in self.used)
        self.smooth = conv_norm_act(channels, channels)
        self.stride: int = reductions[self.used[0]]
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, channels, H / stride, W / stride)."""
        features = self.net(images)
        x: Tensor | None = None
        for index, lateral in zip(reversed(self.used), reversed(list(self.lateral)), strict=True):
            y = lateral(features[index])
            x = y if x is None else y + F.interpolate(x, size=y.shape[-2:], mode="nearest")
        assert x is not None
        return self.smooth(x)


class SmpBody(nn.Module):
    """Encoder and decoder of segmentation-models-pytorch, without its head.

    A `Unet` is cut at the wanted stride: its last blocks would only be pooled away again.
    """

    def __init__(self, backbone: str, decoder: str, in_channels: int, stride: int, pretrained: bool | str) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp  # slow to import, and not every profile needs it

        architectures = {name.lower(): name for name in dir(smp) if isinstance(getattr(smp, name), type)}
        if decoder.lower() not in architectures:
            known = ", ".join(sorted(n for n in architectures.values() if issubclass(getattr(smp, n), nn.Module)))
            raise InputError(f"model.decoder: unknown {decoder!r}; expected auto, branch, pyramid or one of {known}")
        native = backbone in smp.encoders.encoders
        name = backbone if native or backbone.startswith("tu-") else f"tu-{backbone}"
        if not native and not timm.is_model(name.removeprefix("tu-")):
            raise InputError(f"model.backbone: neither timm nor segmentation-models-pytorch has {backbone!r}")
        try:
            model = getattr(smp, architectures[decoder.lower()])(
                encoder_name=name,
                encoder_weights=("imagenet" if native else True) if pretrained is True else None,
                in_channels=in_channels,
                classes=1,
            )
        except (OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
            if pretrained is not True or not isinstance(error, OSError | RuntimeError):
                raise InputError(f"model.decoder: {decoder} over {backbone}: {first_line(error)}") from error
            raise InputError(f"model.pretrained: no weights for {backbone} ({first_line(error)}); {WAY_OUT}") from error
        self.encoder: nn.Module = model.encoder
        if isinstance(pretrained, str):
            load_weights(self.encoder, pretrained)
        self.decoder: nn.Module = model.decoder
        self.channels: int = model.segmentation_head[0].in_channels
        if isinstance(model, smp.Unet) and stride > 1:
            keep = 5 - {2: 1, 4: 2}[stride]
            blocks = self.decoder.get_submodule("blocks")
            assert isinstance(blocks, nn.ModuleList)
            self.decoder.blocks = blocks[:keep]
            self.channels = _out_channels(blocks[keep - 1])
        self.stride = self._measure_stride(in_channels)

    @torch.no_grad()
    def _measure_stride(self, in_channels: int) -> int:
        was_training = self.training
        self.eval()
        out = self(torch.zeros(1, in_channels, 256, 256))  # PAN pools five times and then three more
        self.train(was_training)
        return 256 // out.shape[-1]

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, channels, H / stride, W / stride)."""
        return self.decoder(self.encoder(images))


class Head(nn.Sequential):
    """A 1x1 convolution to K maps, after convolutions that bring `have` to the stride `want`."""

    def __init__(self, channels: int, num_landmarks: int, have: int, want: int) -> None:
        layers: list[nn.Module] = []
        if want > have:
            layers.append(conv_norm_act(channels, channels, stride=want // have))
        while have > want:
            layers += [nn.Upsample(scale_factor=2, mode="bilinear"), conv_norm_act(channels, channels)]
            have //= 2
        final = nn.Conv2d(channels, num_landmarks, 1)
        # Maps start near zero, where almost every target value is: without it the first steps only unlearn noise.
        nn.init.normal_(final.weight, std=1e-3)
        nn.init.zeros_(final.bias if final.bias is not None else torch.empty(0))
        super().__init__(*layers, final)


def conv_norm_act(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def create_timm(name: str, in_channels: int, pretrained: bool | str, **kwargs: Any) -> Any:
    """A timm `features_only` model; `pretrained` may be a local weights file.

    Raises:
        InputError: the name is unknown, has no feature maps, or its weights cannot be had.
    """
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:6]) or "see timm.list_models()"
        raise InputError(f"model.backbone: timm has no model {name!r}; near it: {near}")
    try:
        model = timm.create_model(
            name, features_only=True, in_chans=in_channels, pretrained=pretrained is True, **kwargs
        )
    except (OSError, ConnectionError) as error:
        raise InputError(f"model.pretrained: no weights for {name} ({first_line(error)}); {WAY_OUT}") from error
    except RuntimeError as error:
        if pretrained is True and "pretrained" in str(error).lower():
            raise InputError(f"model.pretrained: {first_line(error)}; {WAY_OUT}") from error
        raise InputError(f"model.backbone: {name} has no feature maps ({first_line(error)})") from error
    if isinstance(pretrained, str):
        load_weights(model, pretrained)
    return model


def outermost_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The residual blocks of a network that do not lie inside another block."""
    for child in module.children():
        if type(child).__name__.endswith(BLOCK_NAMES):
            yield child
        else:
            yield from outermost_blocks(child)


def compile_blocks(module: nn.Module, **kwargs: Any) -> int:
    """Compile every residual block in place and return how many there were.

    Blocks of one shape share their compiled code, so this takes seconds where a whole HRNet takes minutes. HRNet's
    multi-branch modules are opened first: their branches' blocks are what repeats.
    """
    count = 0
    for child in module.children():
        name = type(child).__name__
        if name.endswith(BLOCK_NAMES) and not name.endswith("HighResolutionModule"):
            child.compile(**kwargs)
            count += 1
        else:
            count += compile_blocks(child, **kwargs)
    return count


def checkpoint_blocks(module: nn.Module) -> None:
    """Make every outermost residual block recompute its activations in the backward pass.

    The block's class is exchanged rather than wrapped, so that names in the state dict stay what they are.
    """
    for block in list(outermost_blocks(module)):
        block.__class__ = _checkpointed(type(block))


@functools.cache
def _checkpointed(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return cls.forward(self, *args, **kwargs)

        def run(*inner: Any) -> Any:
            # HRNet's modules write into the list they are given; the second run must see the first one's inputs.
            return cls.forward(self, *(list(a) if isinstance(a, list) else a for a in inner), **kwargs)

        return checkpoint(run, *args, use_reentrant=False)

    return type(cls.__name__, (cls,), {"forward": forward})


def _out_channels(module: nn.Module) -> int:
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    return convolutions[-1].out_channels
