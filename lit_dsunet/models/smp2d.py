"""Two-dimensional networks of segmentation-models-pytorch with logit heads on their decoder's stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_cli.errors import InputError
from lit_dsunet.models.heads import Heads

__all__ = ["SliceNet", "slices_to_channels"]


class SliceNet(nn.Module):
    """Any encoder and decoder of segmentation-models-pytorch, with deep supervision.

    The auxiliary heads sit on what the decoder's own modules put out: for each resolution coarser than the logits the
    last such map. This is found by running the decoder once on zeros, so it works for every decoder of the library.

    Args:
        in_channels: Image channels; for 2.5-D the channels of all slices together.
        num_classes: Channels of the logits.
        encoder: Name of an encoder, or `tu-...` for timm's.
        decoder: Unet, UnetPlusPlus, FPN, Linknet, MAnet, PSPNet, PAN, DeepLabV3, DeepLabV3Plus, UPerNet, Segformer.
        pretrained: ImageNet weights for the encoder (downloaded), a path of a state dict, or none.
        deep_supervision: Auxiliary heads.

    Attributes:
        stride: Per axis, what an image side must be a multiple of.
        head_strides: Stride per axis of each head's logits, finest first.

    Raises:
        InputError: the library has no such encoder or decoder, or the weights cannot be had.
        ValueError: the decoder has not so many stages.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        encoder: str = "resnet34",
        decoder: str = "Unet",
        pretrained: bool | str = False,
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        self.net = _create(encoder, decoder, in_channels, num_classes, pretrained)
        self.stride = (32, 32)
        self._maps: dict[str, Tensor] = {}
        names = dict(self.net.decoder.named_modules())
        stages = self._stages()
        self._stage_names = [name for name, _, _ in stages]
        for name in self._stage_names:
            names[name].register_forward_hook(_Keep(self, name))
        self.head_strides = [(1, 1), *((s, s) for _, _, s in reversed(stages))]
        if not 0 <= deep_supervision <= len(stages):
            raise ValueError(f"model.deep_supervision: {decoder} has {len(stages)} stages, got {deep_supervision}")
        # The last of `Heads` would be the finest logits, but that head is the library's own.
        channels = [c for _, c, _ in stages]
        self.heads = Heads([*channels, num_classes], num_classes, 2, deep_supervision)
        self.heads.convs[-1] = nn.Identity()

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of images (B, C, H, W), sides multiples of 32; as of `UNet.forward`."""
        self._maps.clear()
        finest = self.net(x)
        maps = [self._maps.get(name, finest) for name in self._stage_names]
        self._maps.clear()
        return self.heads([*maps, finest])

    def _stages(self) -> list[tuple[str, int, int]]:
        """Name, channels and stride of the last map at each coarser resolution, coarsest first."""
        seen: dict[int, tuple[str, int, int]] = {}
        side = 256  # some decoders pool to an eighth of the coarsest map

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                if isinstance(out, Tensor) and out.ndim == 4 and 1 < out.shape[-1] < side and side % out.shape[-1] == 0:
                    seen[side // out.shape[-1]] = (name, out.shape[1], side // out.shape[-1])

            return hook

        handles = [m.register_forward_hook(note(n)) for n, m in self.net.decoder.named_modules() if n]
        training = self.net.training
        self.net.eval()
        with torch.no_grad():
            first = next(self.net.encoder.parameters())
            self.net(torch.zeros(1, self.net.encoder._in_channels, side, side, device=first.device))
        self.net.train(training)
        for handle in handles:
            handle.remove()
        return [seen[stride] for stride in sorted(seen, reverse=True)]


class _Keep:
    """Hook that keeps a map for the heads; a class, so that the module can be pickled."""

    def __init__(self, owner: SliceNet, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if self.owner.training:
            self.owner._maps[self.name] = out


def _create(encoder: str, decoder: str, channels: int, classes: int, pretrained: bool | str) -> Any:
    import segmentation_models_pytorch as smp

    weights = "imagenet" if pretrained is True else None
    try:
        net = smp.create_model(
            decoder, encoder_name=encoder, encoder_weights=weights, in_channels=channels, classes=classes
        )
    except KeyError as error:
        raise InputError(f"model: segmentation-models-pytorch has no {decoder!r} over {encoder!r}") from error
    except OSError as error:
        raise InputError(
            f"model.pretrained: the weights of {encoder} could not be fetched ({str(error).splitlines()[0]:.80}); set "
            "--model.pretrained false, or a path of a state dict"
        ) from error
    if isinstance(pretrained, str):
        try:
            state = torch.load(pretrained, map_location="cpu", weights_only=True)
            net.get_submodule("encoder").load_state_dict(state)
        except (OSError, RuntimeError, AttributeError) as error:
            raise InputError(
                f"model.pretrained: {pretrained} does not fit {encoder}: {str(error).splitlines()[0]:.100}"
            ) from error
    return net


def slices_to_channels(volume: Tensor, count: int) -> Tensor:
    """2.5-D: each slice with its neighbours as channels.

    Args:
        volume: (B, C, D, H, W).
        count: Odd number of slices; the outer ones are repeated at the ends.

    Returns:
        (B * D, C * count, H, W).
    """
    half = count // 2
    depth = volume.shape[2]
    index = torch.arange(depth, device=volume.device)[:, None] + torch.arange(-half, half + 1, device=volume.device)
    picked = volume[:, :, index.clamp(0, depth - 1)]  # (B, C, D, count, H, W)
    return picked.permute(0, 2, 1, 3, 4, 5).flatten(2, 3).flatten(0, 1)
