"""Losses for softmax classes with one signature, lean in memory, and their sum over the heads of deep supervision.

Every loss takes `logits` (B, K, ...) of any floating type and a `target`: class indices (B, ...) of any integer type,
or shares (B, K, ...) that sum to 1 over the classes, as `targets.ds_targets` makes them. It returns a float32 scalar (a
float64 one for float64 logits). The logits are converted first and all sums are taken in float32, under autocast too.
Nothing waits for the device, and everything can be compiled as one graph. An index outside 0 to K - 1 is not looked
for, since that would wait: such a voxel belongs to no class, has no cross entropy, and what is predicted there counts
as wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_dsunet.targets import TargetMode, WeightRule, device_components, ds_targets, ds_weights

__all__ = [
    "BlobLoss",
    "DeepSupervisionLoss",
    "DiceCELoss",
    "FocalLoss",
    "GeneralisedDiceLoss",
    "LossName",
    "TopKLoss",
    "TverskyLoss",
    "make_loss",
]

LossName = Literal["dice_ce", "tversky", "focal", "topk", "generalised_dice", "blob"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _shares(target: Tensor, classes: int, dims: int) -> Tensor:
    """(B, K, ...): the one-hot code of indices as bool, a byte per voxel and class; shares as they are."""
    if target.ndim == dims:
        return target
    return target.unsqueeze(1) == torch.arange(classes, device=target.device).view(-1, *(1,) * (dims - 2))


class Sums(NamedTuple):
    """Sums over the voxels of each sample and class, (B, K) float32.

    For indices, `overlap` is the sum of p where the class is. For shares y it is the sum of min(p, y), which agrees
    with that where y is 0 or 1. The product p y would not do: a Dice of it is best at p = 1 wherever y exceeds half the
    Dice, so that a head would be taught to overstate every lesion.
    """

    overlap: Tensor  # of min(p, y)
    predicted: Tensor  # of p
    present: Tensor  # of y, without gradient
    cross: Tensor  # of -y log p


class _SoftmaxSums(torch.autograd.Function):
    """`Sums` of logits and target.

    Written out by hand because autograd would keep log p, p and the products for the way back, 4 bytes per voxel and
    class each. Here only the logits (in the type they came in) and the target are kept, and p is computed again.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(logits, target)
        y = _shares(target, logits.shape[1], logits.ndim)
        log_p = F.log_softmax(_wide(logits), dim=1)
        p = log_p.exp()
        voxels = tuple(range(2, logits.ndim))
        hard = y.dtype == torch.bool
        overlap = (p * y if hard else torch.minimum(p, _wide(y))).sum(voxels)
        return overlap, p.sum(voxels), y.sum(voxels, dtype=p.dtype), -(log_p * y).sum(voxels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, target = ctx.saved_tensors
        shape = (*logits.shape[:2], *(1,) * (logits.ndim - 2))
        d_overlap, d_predicted, _, d_cross = (g.reshape(shape) for g in grads)
        y = _shares(target, logits.shape[1], logits.ndim)
        p = F.softmax(_wide(logits), dim=1)
        # d/dp of overlap and predicted goes through the softmax; that of cross is p - y, without a division by p. In
        # place, since all activations of the network are still alive at this point.
        grad = d_predicted + d_overlap * (y if y.dtype == torch.bool else p < y)
        grad -= (p * grad).sum(1, keepdim=True)
        crossing = d_cross * y
        grad += crossing.sum(1, keepdim=True)
        grad *= p
        grad -= crossing
        return grad.to(logits.dtype), None


def softmax_sums(logits: Tensor, target: Tensor) -> Sums:
    """The sums that Dice, Tversky and cross entropy are made of, in one pass over the voxels."""
    dims = logits.ndim
    if logits.shape[1] < 2:
        raise ValueError(f"logits: expected two classes or more, got {logits.shape[1]}")
    if target.shape not in (logits.shape, logits[:, 0].shape) or (target.ndim < dims) == target.is_floating_point():
        raise ValueError(
            f"target: expected class indices {tuple(logits[:, 0].shape)} or shares {tuple(logits.shape)}, got "
            f"{tuple(target.shape)} {target.dtype}"
        )
    return Sums(*_SoftmaxSums.apply(logits, target))  # type: ignore[arg-type]


def _cross_entropy(sums: Sums, weights: Tensor | None) -> Tensor:
    """Mean over the voxels, or weighted mean as torch's `cross_entropy` defines it."""
    cross, present = sums.cross.sum(0), sums.present.sum(0)
    if weights is not None:
        cross, present = cross * weights, present * weights
    return cross.sum() / present.sum().clamp_min(torch.finfo(present.dtype).tiny)


def _voxel_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(B, ...) float32 cross entropy of each voxel."""
    log_p = F.log_softmax(_wide(logits), dim=1)
    return -(log_p * _shares(target, logits.shape[1], logits.ndim)).sum(1)


class _RegionLoss(nn.Module):
    """1 - mean index over the foreground classes, and cross entropy.

    Args:
        alpha: Weight of false positives in the index.
        beta: Weight of false negatives.
        region: Factor of the first term.
        ce: Factor of the second.
        batch_dice: Take the index over the whole batch rather than per sample.
        smooth: Added to numerator and denominator.
        class_weights: K factors for the cross entropy.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        alpha: float,
        beta: float,
        region: float,
        ce: float,
        batch_dice: bool,
        smooth: float,
        class_weights: Sequence[float] | None,
    ) -> None:
        super().__init__()
        values = {"alpha": alpha, "beta": beta, "dice": region, "ce": ce, "smooth": smooth}
        for name, value in values.items():
            if not value >= 0:
                raise InputError(f"loss: {name} is {value}, expected 0 or more")
        self.alpha, self.beta, self.region, self.ce = alpha, beta, region, ce
        self.batch_dice, self.smooth = batch_dice, smooth
        weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """() float32."""
        return self.of_sums(softmax_sums(logits, target))

    def of_sums(self, sums: Sums) -> Tensor:
        """The loss from its sums."""
        overlap, predicted, present = (
            (t.sum(0, keepdim=True) if self.batch_dice else t)[:, 1:]
            for t in (sums.overlap, sums.predicted, sums.present)
        )
        whole = overlap + self.alpha * (predicted - overlap) + self.beta * (present - overlap)
        # Half of `smooth`, so that alpha = beta = 1/2 is Dice with all of it: (2 overlap + smooth) / (...).
        index = (overlap + self.smooth / 2) / (whole + self.smooth / 2).clamp_min(1e-8)
        return self.region * (1 - index.mean()) + self.ce * _cross_entropy(sums, self.class_weights)


class DiceCELoss(_RegionLoss):
    """Soft Dice over the foreground classes plus cross entropy over all.

    A class without a voxel in the target has Dice 0 but for `smooth`, and next to no gradient from it; what is
    predicted there is unlearned through the cross entropy.

    Args:
        dice: Factor of 1 - Dice, averaged over samples and foreground classes.
        ce: Factor of the cross entropy, averaged over voxels.
        batch_dice: Take Dice over all voxels of the batch rather than per sample. Calmer where many patches hold no
            foreground.
        smooth: Added to numerator and denominator of Dice.
        class_weights: K factors for the cross entropy; None for equal ones.

    Source:
        nnU-Net (arXiv 1904.08128); for shares the Dice semimetric DML1 (arXiv 2303.16296).

    Example:
        >>> target = torch.tensor([[[0, 1], [1, 0]]])
        >>> logits = 20 * F.one_hot(target, 2).movedim(-1, 1).float()
        >>> loss = DiceCELoss()
        >>> round(loss(logits, target).item(), 4), round(loss(-logits, target).item(), 4)
        (0.0, 21.0)
    """

    def __init__(
        self,
        *,
        dice: float = 1.0,
        ce: float = 1.0,
        batch_dice: bool = False,
        smooth: float = 1e-5,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(0.5, 0.5, dice, ce, batch_dice, smooth, class_weights)


class TverskyLoss(_RegionLoss):
    """Tversky index over the foreground classes, TP / (TP + alpha FP + beta FN), plus cross entropy.

    Args:
        alpha: Weight of false positives.
        beta: Weight of false negatives; above `alpha` it favours recall. Both 1/2 give Dice.
        ce: Factor of the cross entropy. Without it a batch that holds no foreground has next to no gradient.
        batch_dice: As in `DiceCELoss`.
        smooth: Likewise.
        class_weights: Likewise.

    Source:
        arXiv 1706.05721.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        beta: float = 0.7,
        ce: float = 1.0,
        batch_dice: bool = False,
        smooth: float = 1e-5,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(alpha, beta, 1.0, ce, batch_dice, smooth, class_weights)


class FocalLoss(nn.Module):
    """Cross entropy in which a voxel's share y of a class counts (1 - p)^gamma, plus Dice where wanted.

    Args:
        gamma: 0 for the plain cross entropy, otherwise at least 1, below which the gradient is unbounded at p = 1.
        dice: Factor of 1 - Dice.
        batch_dice: As in `DiceCELoss`.

    Source:
        arXiv 1708.02002, with softmax in place of the sigmoid.
    """

    def __init__(self, *, gamma: float = 2.0, dice: float = 0.0, batch_dice: bool = False) -> None:
        super().__init__()
        if gamma != 0 and not gamma >= 1:
            raise InputError(f"loss: gamma is {gamma}, expected 0 or at least 1")
        self.gamma = gamma
        self.dice = DiceCELoss(dice=dice, ce=0.0, batch_dice=batch_dice) if dice else None

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """() float32."""
        log_p = F.log_softmax(_wide(logits), dim=1)
        terms = -(log_p * _shares(target, logits.shape[1], logits.ndim))
        if self.gamma:
            terms = terms * (-torch.expm1(log_p)) ** self.gamma  # 1 - p without cancellation
        loss = terms.sum(1).mean()
        return loss if self.dice is None else loss + self.dice(logits, target)


class TopKLoss(nn.Module):
    """Cross entropy averaged over the hardest voxels of the batch, plus Dice where wanted.

    Args:
        percent: Share of the voxels that count, above 0 to 100.
        dice: Factor of 1 - Dice.
        batch_dice: As in `DiceCELoss`.

    Source:
        arXiv 1605.06885; nnU-Net's `DC_and_topk_loss` takes 10 %.
    """

    def __init__(self, *, percent: float = 10.0, dice: float = 0.0, batch_dice: bool = False) -> None:
        super().__init__()
        if not 0 < percent <= 100:
            raise InputError(f"loss: percent is {percent}, expected more than 0 and at most 100")
        self.percent = percent
        self.dice = DiceCELoss(dice=dice, ce=0.0, batch_dice=batch_dice) if dice else None

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """() float32."""
        entropy = _voxel_entropy(logits, target).flatten()
        count = max(1, int(entropy.numel() * self.percent / 100))
        loss = entropy.topk(count, sorted=False).values.mean()
        return loss if self.dice is None else loss + self.dice(logits, target)


class GeneralisedDiceLoss(nn.Module):
    """Generalised Dice over all classes and the whole batch, as the original guide has it; for reproduction.

    A class weighs 1 / max((its voxels)^2, 1e-5). Where a class has no voxel that weight is 1e5 and drowns the others:
    the loss is about 1, whatever is predicted, and its gradient next to nothing.

    Source:
        arXiv 1707.03237, with the background and the clamp of the guide.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """() float32."""
        overlap, predicted, present, _ = (t.sum(0) for t in softmax_sums(logits, target))
        weights = 1 / present.square().clamp_min(1e-5)
        return 1 - 2 * (weights * overlap).sum() / (weights * (predicted + present)).sum()


class BlobLoss(nn.Module):
    """Dice and cross entropy, plus a Dice of every lesion by itself, so that a small one counts as much as a large one.

    The Dice of a lesion looks at all voxels but those of the other lesions of its class. With TP its own overlap, n its
    size and FP what is predicted outside all lesions, it is 2 TP / (TP + FP + n), so that one sum over the background
    and one per lesion suffice. They are averaged over the lesions of a sample, then over samples and classes that have
    any. Lesions are the 26-connected (8-connected) components of a class, found on the device; of shares, those of the
    voxels above 0.

    Args:
        blob: Factor of the lesions' term.
        dice: As in `DiceCELoss`.
        ce: Likewise.
        batch_dice: Likewise.
        iterations: Rounds of the component search, which cost more than the rest of the loss; see `device_components`.

    Source:
        arXiv 2205.08209, which adds them 2 (whole) to 1 (lesions).
    """

    def __init__(
        self,
        *,
        blob: float = 0.5,
        dice: float = 1.0,
        ce: float = 1.0,
        batch_dice: bool = False,
        iterations: int = 8,
    ) -> None:
        super().__init__()
        if not blob >= 0:
            raise InputError(f"loss: blob is {blob}, expected 0 or more")
        self.blob, self.iterations = blob, iterations
        self.whole = DiceCELoss(dice=dice, ce=ce, batch_dice=batch_dice)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """() float32."""
        whole = self.whole(logits, target)
        p = F.softmax(_wide(logits), dim=1)
        y = _shares(target, logits.shape[1], logits.ndim)
        lost, found = whole.new_zeros(()), whole.new_zeros(())
        for k in range(1, logits.shape[1]):
            inside = y[:, k] if y.dtype == torch.bool else y[:, k] > 0
            # A bin per voxel, so that the number of lesions is not needed on the host: a lesion's is that of one of its
            # voxels. Background goes to its own bin with nothing in it rather than to a common one, where the
            # device's atomic additions would queue.
            bins = device_components(inside, self.iterations).flatten(1)
            p_k, y_k, inside = p[:, k].flatten(1), y[:, k].flatten(1).to(p.dtype), inside.flatten(1)
            empty = torch.zeros_like(p_k)
            overlap = empty.scatter_add(1, bins, torch.minimum(p_k, y_k))
            predicted = empty.scatter_add(1, bins, p_k * inside)
            size = empty.scatter_add(1, bins, y_k)
            outside = (p_k * ~inside).sum(1, keepdim=True)
            present = size > 0
            dice = 2 * overlap / (predicted + outside + size).clamp_min(1e-8)
            count = present.sum(1)
            lost = lost + (torch.where(present, 1 - dice, 0).sum(1) / count.clamp_min(1)).sum()
            found = found + (count > 0).sum()
        return whole + self.blob * lost / found.clamp_min(1)


class DeepSupervisionLoss(nn.Module):
    """Weighted sum of a loss over the heads, each against the label at its own resolution.

    Args:
        base: Any loss of this module.
        weights: Of the heads, finest first; see `targets.ds_weights`. A head of weight 0 is left out, so its
            parameters get no gradient.
        mode: What the coarser heads are taught, see `targets.ds_targets`; `upsample` interpolates their logits to the
            label's size instead, which the original guide does and which costs a full-resolution loss per head.

    Example:
        >>> loss = DeepSupervisionLoss(make_loss("dice_ce"))
        >>> label = torch.zeros(1, 8, 8, 8, dtype=torch.uint8)
        >>> loss([torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 2, 4, 4, 4)], label)
        tensor(1.6931)
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        weights: WeightRule | Sequence[float] = "halving",
        mode: TargetMode | Literal["upsample"] = "soft",
    ) -> None:
        super().__init__()
        modes = (*get_args(TargetMode), "upsample")
        if mode not in modes:
            raise InputError(f"targets: mode is {mode!r}, expected one of {', '.join(modes)}")
        if not isinstance(weights, str):
            ds_weights(len(weights), weights)
        self.base, self.mode = base, mode
        self.weights: WeightRule | Sequence[float] = weights

    def forward(self, logits: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (B, K, ...) of the heads, finest first, or of the only one, whose loss then has weight 1.
            label: (B, ...) class indices; each head's size divides its size.

        Returns:
            () float32.
        """
        if isinstance(logits, Tensor):
            heads, weights = [logits], (1.0,)
        else:
            heads = list(logits)
            weights = ds_weights(len(heads), self.weights)
        size = tuple(label.shape[1:])
        if self.mode == "upsample":
            how = "trilinear" if len(size) == 3 else "bilinear"
            heads = [h if h.shape[2:] == size else F.interpolate(_wide(h), size=size, mode=how) for h in heads]
            targets = [label] * len(heads)
        else:
            for head in heads:
                if any(n % m for n, m in zip(size, head.shape[2:], strict=True)):
                    raise ValueError(f"logits: size {tuple(head.shape[2:])} does not divide the label's {size}")
            strides = [[n // m for n, m in zip(size, head.shape[2:], strict=True)] for head in heads]
            targets = ds_targets(label, heads[0].shape[1], strides, self.mode)  # type: ignore[arg-type]
        terms = [w * self.base(h, t) for w, h, t in zip(weights, heads, targets, strict=True) if w > 0]
        return torch.stack(terms).sum()


_LOSSES: dict[LossName, type[nn.Module]] = {
    "dice_ce": DiceCELoss,
    "tversky": TverskyLoss,
    "focal": FocalLoss,
    "topk": TopKLoss,
    "generalised_dice": GeneralisedDiceLoss,
    "blob": BlobLoss,
}


def make_loss(name: LossName, **options: Any) -> nn.Module:
    """A loss by its name.

    Args:
        name: `dice_ce`, `tversky`, `focal`, `topk`, `generalised_dice` or `blob`.
        options: Of the class.

    Raises:
        InputError: There is no such loss, or it has no such option.

    Example:
        >>> make_loss("tversky", beta=0.8).beta
        0.8
    """
    if name not in _LOSSES:
        raise InputError(f"loss: name is {name!r}, expected one of {', '.join(_LOSSES)}")
    known = [p for p in inspect.signature(_LOSSES[name].__init__).parameters if p not in ("self", "args", "kwargs")]
    for option in options:
        if option not in known:
            raise InputError(f"loss: {name} has no option {option!r}, expected one of {', '.join(known) or 'none'}")
    return _LOSSES[name](**options)
