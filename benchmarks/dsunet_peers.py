"""What the benchmarks of lit_dsunet need of its peers: MONAI, dynamic-network-architectures and nnU-Net.

Only public classes and their documented options; everything is imported inside the functions, so that a script says
what is missing and measures the rest. The settings are nnU-Net's: instance normalisation, leaky ReLU, Dice and
cross-entropy on every head but the coarsest, the next coarser one with half the weight.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lit_dsunet.sliding_window import window_starts

Axes = int | Sequence[int]

# Readers and the like that nnU-Net imports and that no function called here uses. SimpleITK alone has 53 MB.
UNUSED = ("SimpleITK", "blosc2", "cc3d", "threadpoolctl", "tifffile", "skimage", "httpx", "numexpr", "ndindex")


class _Anything(type):
    """A class whose attributes are such classes, enough for annotations and base classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Absent(ModuleType):
    """Stands for a module that is imported but not used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


def load(name: str) -> Any:
    """Import a module of a peer, with stand-ins for libraries that it imports but that are not used here.

    Raises:
        ModuleNotFoundError: the peer itself, or a library that is used, is not installed.
    """
    stood_in: list[str] = []
    try:
        while True:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                missing = error.name or ""
                if missing.partition(".")[0] not in UNUSED or missing in sys.modules:
                    raise
                sys.modules[missing] = _Absent(missing)
                stood_in.append(missing)
    finally:
        for missing in stood_in:  # others must not take them for the real ones
            del sys.modules[missing]


def version(package: str) -> str | None:
    """`monai 1.6.1`; None where it is not installed.

    >>> version("no-such-package") is None
    True
    """
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- networks -------------------------------------------------------------------------------------------------------


def dynunet(
    in_channels: int,
    classes: int,
    features: Sequence[int],
    strides: Sequence[Axes],
    kernels: Sequence[Axes] | None = None,
    deep_supervision: bool = True,
) -> nn.Module:
    """MONAI's DynUNet with a head on every decoder stage, which it interpolates to full size in training."""
    nets = load("monai.networks.nets")
    return nets.DynUNet(
        3,
        in_channels,
        classes,
        kernel_size=list(kernels or [3] * len(features)),
        strides=list(strides),
        upsample_kernel_size=list(strides[1:]),
        filters=list(features),
        norm_name=("INSTANCE", {"affine": True}),
        deep_supervision=deep_supervision and len(features) > 2,
        deep_supr_num=max(1, len(features) - 2),
        res_block=False,
    )


def plain_conv_unet(
    in_channels: int,
    classes: int,
    features: Sequence[int],
    strides: Sequence[Axes],
    kernels: Sequence[Axes] | None = None,
    deep_supervision: bool = True,
) -> nn.Module:
    """nnU-Net's default network."""
    unet = load("dynamic_network_architectures.architectures.unet")
    return unet.PlainConvUNet(
        in_channels,
        len(features),
        list(features),
        nn.Conv3d,
        list(kernels or [3] * len(features)),
        list(strides),
        2,
        classes,
        2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision,
    )


# ---- losses: functions of what the network gives and the label (B, D, H, W) ------------------------------------------


def monai_loss(batch_dice: bool = False) -> Callable[[Any, Tensor], Tensor]:
    """MONAI's DeepSupervisionLoss around its DiceCELoss, the background left out of the Dice as in nnU-Net."""
    losses = load("monai.losses")
    base = losses.DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice)
    deep = losses.DeepSupervisionLoss(base)

    def loss(out: Any, label: Tensor) -> Tensor:
        heads = list(torch.unbind(out, dim=1)) if out.ndim == label.ndim + 2 else [out]
        return deep(heads, label.unsqueeze(1).float())

    return loss


def nnunet_loss(heads: int, compile_dice: Callable[[nn.Module], nn.Module] | None = None) -> Callable[..., Tensor]:
    """nnU-Net's own DC_and_CE_loss in its DeepSupervisionWrapper, for a list of targets as its loader delivers them."""
    compound = load("nnunetv2.training.loss.compound_losses")
    wrapper = load("nnunetv2.training.loss.deep_supervision").DeepSupervisionWrapper
    dice_class = load("nnunetv2.training.loss.dice").MemoryEfficientSoftDiceLoss
    options = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    base = compound.DC_and_CE_loss(options, {}, weight_ce=1, weight_dice=1, ignore_label=None, dice_class=dice_class)
    if compile_dice is not None:
        base.dc = compile_dice(base.dc)
    weights = [0.5**i for i in range(heads)]
    if heads > 1:
        weights[-1] = 0.0
    return wrapper(base, [w / sum(weights) for w in weights])


def nearest_targets(label: Tensor, strides: Sequence[Sequence[int]]) -> list[Tensor]:
    """The label (B, D, H, W) as float (B, 1, ...) on the grid of each head."""
    steps = [tuple(slice(None, None, s) for s in stride) for stride in strides]
    return [label[(slice(None), *step)].unsqueeze(1).float().contiguous() for step in steps]


# ---- inference ------------------------------------------------------------------------------------------------------


def monai_overlap(size: Sequence[int], patch: Sequence[int]) -> tuple[float, ...]:
    """Overlap per axis for which MONAI's windows begin where ours and nnU-Net's do with half a window.

    MONAI moves on by `int(patch * (1 - overlap))` voxels and puts the last window at the end; ours are evenly spread.

    >>> [int(p * (1 - o)) for p, o in zip((128, 80), monai_overlap((240, 88), (128, 80)))]
    [56, 8]
    """
    steps = []
    for s, p in zip(size, patch, strict=True):
        starts = window_starts(max(s, p), p, 0.5)
        steps.append(starts[1] if len(starts) > 1 else p // 2)
    return tuple(1 - (step + 0.5) / p for step, p in zip(steps, patch, strict=True))


def mirrored(network: Callable[[Tensor], Tensor], axes: Sequence[int] = (0, 1, 2)) -> Callable[[Tensor], Tensor]:
    """A network whose logits are averaged over all reflections of a window, for MONAI, which has no such option.

    >>> mirrored(lambda x: x)(torch.arange(8.0).view(1, 1, 2, 2, 2)).flatten()[:3]
    tensor([0., 1., 2.])
    """
    sets = [c for n in range(len(axes) + 1) for c in itertools.combinations([a + 2 for a in axes], n)]

    def forward(x: Tensor) -> Tensor:
        total = network(x)
        for flipped in sets[1:]:
            total = total + network(x.flip(flipped)).flip(flipped)
        return total / len(sets)

    return forward


def monai_windows(
    network: Callable[[Tensor], Tensor],
    volume: Tensor,
    patch: Sequence[int],
    sw_batch: int,
    overlap: float | Sequence[float] = 0.5,
    weight: Tensor | None = None,
) -> Tensor:
    """Logits (K, D, H, W) of a volume (C, D, H, W) by MONAI's sliding window, with its Gaussian weights by default."""
    inferers = load("monai.inferers")
    return inferers.sliding_window_inference(
        volume[None], tuple(patch), sw_batch, network, overlap=overlap, mode="gaussian", roi_weight_map=weight
    )[0]


def nnunet_predictor(
    network: nn.Module, classes: int, patch: Sequence[int], device: torch.device, mirror: bool
) -> Callable[[Tensor], Tensor]:
    """nnU-Net's predictor around any network: logits (K, D, H, W) of a volume (C, D, H, W), fp16 on a GPU."""
    predict = load("nnunetv2.inference.predict_from_raw_data")
    predictor = predict.nnUNetPredictor(
        tile_step_size=0.5, use_gaussian=True, use_mirroring=mirror, device=device, allow_tqdm=False
    )
    # Of the plans it asks only for the patch and the number of heads.
    plans = SimpleNamespace(get_label_manager=lambda _: SimpleNamespace(num_segmentation_heads=classes))
    configuration = SimpleNamespace(patch_size=tuple(patch))
    predictor.manual_initialization(network, plans, configuration, None, {}, "", (0, 1, 2) if mirror else None)
    return predictor.predict_sliding_window_return_logits
