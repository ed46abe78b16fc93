"""The loss of a detection transformer: classification, L1, GIoU and NWD of all decoder layers in one pass.

Logits and boxes of the decoder layers and of the encoder's proposals are stacked; what a query is as background is
summed over all of them, and what a match changes is gathered at the matched queries. So no tensor is larger than the
stacked logits, the stacked boxes or the matcher's budget, however many boxes there are. Everything is calculated in
float32, under autocast too, and nothing waits for the device but the threads of the matcher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_cli.errors import InputError
from lit_detr.boxes import cxcywh_to_xyxy, iou_and_giou, nwd, to_pixels, wide
from lit_detr.matching import ClassKind, ClassTerm, Matcher, check_nwd, stack_stages
from lit_detr.samples import Output, Targets

__all__ = ["WEIGHTS", "DetectionLoss"]

WEIGHTS: dict[str, float] = {"class": 1.0, "l1": 5.0, "giou": 2.0, "nwd": 0.0}


class _Pairs(NamedTuple):
    """Predictions and the boxes they are to find, S stages of P pairs each image.

    Attributes:
        logits: (S, B, P) of the box's class.
        boxes: (S, B, P, 4) predicted.
        wanted: (S or 1, B, P, 4).
        valid: (B, P) bool: where there is a pair.
    """

    logits: Tensor
    boxes: Tensor
    wanted: Tensor
    valid: Tensor


class DetectionLoss(nn.Module):
    """Matches queries with boxes and sums the losses.

    Every sum is divided by the number of boxes of the batch (of denoising queries that are to find one, for theirs),
    averaged over all processes in training mode, and by at least 1. A batch without boxes is taught background, and all
    outputs get a gradient, if of 0, so that distributed training does not wait for one. Boxes of crowds are to be left
    out of the targets beforehand.

    Args:
        matcher: With its own costs and, where it uses NWD, its own constant.
        class_kind: Classification loss, see `ClassTerm`; the IoU of a pair is its quality.
        weights: Factors of `class`, `l1` (of centre and size as shares of the image, summed over the four), `giou`
            (1 - GIoU) and `nwd` (1 - NWD). Names that are left out have those of `WEIGHTS`.
        alpha: Of `ClassTerm`.
        gamma: Of `ClassTerm`.
        nwd_constant: C of NWD in pixels of the network's input; needed where its weight is above 0.
        auxiliary: Factor of the decoder layers before the last.
        encoder: Factor of the encoder's proposals.
        denoising: Factor of the denoising queries, of all layers.

    Raises:
        InputError: An unknown weight, a number out of range, or no loss on logits or on boxes.

    Source:
        Carion et al., arXiv 2005.12872; denoising of Zhang et al., arXiv 2203.03605. See `ClassTerm` and `boxes`.

    Example:
        >>> from lit_detr.samples import pack_targets
        >>> boxes = torch.rand(2, 1, 5, 4)
        >>> output = Output(torch.zeros(2, 1, 5, 3), boxes, torch.zeros(1, 5, 3), boxes[0])
        >>> terms = DetectionLoss(Matcher())(output, pack_targets([boxes[1, 0, :2]], [torch.ones(2)]), (64, 64))
        >>> list(terms)
        ['loss', 'class', 'l1', 'giou', 'auxiliary', 'encoder']
        >>> round(terms["l1"].item(), 4)
        0.0
    """

    def __init__(
        self,
        matcher: Matcher,
        *,
        class_kind: ClassKind = "mal",
        weights: Mapping[str, float] | None = None,
        alpha: float | None = None,
        gamma: float | None = None,
        nwd_constant: float | None = None,
        auxiliary: float = 1.0,
        encoder: float = 1.0,
        denoising: float = 1.0,
    ) -> None:
        super().__init__()
        for name in weights or {}:
            if name not in WEIGHTS:
                raise InputError(f"loss: weights has no {name!r}, expected some of {', '.join(WEIGHTS)}")
        self.weights = {**WEIGHTS, **(weights or {})}
        factors = {"auxiliary": auxiliary, "encoder": encoder, "denoising": denoising}
        for name, value in {**self.weights, **factors}.items():
            if not 0 <= value < math.inf:
                raise InputError(f"loss: {name} is {value}, expected 0 or more")
        if not self.weights["class"]:
            raise InputError("loss: class is 0, expected more")
        if not any(self.weights[name] for name in ("l1", "giou", "nwd")):
            raise InputError("loss: l1, giou and nwd are 0, expected one above it")
        check_nwd("loss", self.weights["nwd"], nwd_constant)
        self.matcher = matcher
        self.term = ClassTerm(class_kind, alpha, gamma)
        self.nwd_constant = nwd_constant
        self.factors = factors

    def forward(self, output: Output, targets: Targets, size: tuple[int, int]) -> dict[str, Tensor]:
        """The loss of a batch and what it is made of.

        Args:
            output: Of the network, on one device.
            targets: On the same device.
            size: (height, width) of the padded image in pixels, to which boxes are shares.

        Returns:
            Scalars in float32 (float64 for float64 boxes): `loss`, and without gradient its summands, weighted:
            `class`, `l1`, `giou`, `nwd` (those of weight above 0) of the last decoder layer, and their sums over
            `auxiliary` layers, `encoder` and, where there are such queries, `denoising`.
        """
        with torch.autocast(output.boxes.device.type, enabled=False):
            logits, boxes = stack_stages(output)
            pending = self.matcher.start(logits.detach(), boxes.detach(), targets, size)
            # What needs no match is launched while the host assigns.
            boxes = wide(boxes)
            background = self._background(logits.to(boxes.dtype))
            positive, noise = None, None
            if output.noise_target is not None and output.noise_positive is not None:
                positive = output.noise_positive & (output.noise_target >= 0)
            number, noise_number = self._numbers(targets.lengths.sum(), positive, boxes.dtype)
            if positive is not None:
                noise = self._denoising(output, targets.boxes, targets.labels, positive, size)
                noise = self.factors["denoising"] * (noise / noise_number)

            matches = pending.result()
            found = matches.query, matches.target, matches.valid
            terms = self._matched(logits, boxes, targets.boxes, targets.labels, *found, background, size)
            table = torch.stack(list(terms.values())) / number  # (terms, S)
            total = table.sum(0)
            auxiliary = self.factors["auxiliary"] * total[:-2].sum()
            encoder = self.factors["encoder"] * total[-1]
            loss = total[-2] + auxiliary + encoder
            parts = dict(zip(terms, table[:, -2], strict=True)) | {"auxiliary": auxiliary, "encoder": encoder}
            if noise is not None:
                parts["denoising"] = noise
                loss = loss + noise
            return {"loss": loss} | {name: value.detach() for name, value in parts.items()}

    def compile_parts(self, **options: Any) -> None:
        """Compile what comes before and what comes after the assignment, each as one graph.

        Shapes are static as long as images, queries and the packed width of the targets are, so a bucket of each costs
        one compilation.

        Args:
            options: Of `torch.compile`.
        """
        for name in ("_background", "_denoising", "_matched"):
            setattr(self, name, torch.compile(getattr(self, name), fullgraph=True, **options))

    def _background(self, logits: Tensor) -> Tensor:
        """(S,) as if nothing had been matched."""
        return self.term.negative(logits).sum((1, 2, 3))

    def _matched(
        self,
        logits: Tensor,
        boxes: Tensor,
        target_boxes: Tensor,
        target_labels: Tensor,
        query: Tensor,
        target: Tensor,
        valid: Tensor,
        background: Tensor,
        size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """(S,) weighted sums of all stages."""
        image = torch.arange(boxes.shape[1], device=boxes.device)[:, None]
        labels, wanted = target_labels[image, target], target_boxes[image, target].to(boxes.dtype)
        # Gathered rather than indexed, whose way back would sort the indices first.
        of_class = logits.flatten(2).gather(2, query * logits.shape[3] + labels).to(boxes.dtype)
        at_query = boxes.gather(2, query.unsqueeze(-1).expand(-1, -1, -1, 4))
        return self._terms(_Pairs(of_class, at_query, wanted, valid), background, size)

    def _terms(self, pairs: _Pairs, background: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """(S,) weighted sums over images and queries; `background` as if nothing had been matched."""
        valid = pairs.valid.to(pairs.boxes.dtype)

        def total(values: Tensor, weight: float) -> Tensor:
            return weight * (values * valid).sum((1, 2))

        quality, giou = iou_and_giou(cxcywh_to_xyxy(pairs.boxes), cxcywh_to_xyxy(pairs.wanted))
        x = pairs.logits
        change = total(self.term.positive(x, quality.detach()) - self.term.negative(x), 1.0)
        weights = self.weights
        terms = {"class": weights["class"] * (background + change)}
        if weights["l1"]:
            terms["l1"] = total((pairs.boxes - pairs.wanted).abs().sum(-1), weights["l1"])
        if weights["giou"]:
            terms["giou"] = total(1 - giou, weights["giou"])
        if weights["nwd"] and self.nwd_constant is not None:
            likeness = nwd(to_pixels(pairs.boxes, size), to_pixels(pairs.wanted, size), self.nwd_constant)
            terms["nwd"] = total(1 - likeness, weights["nwd"])
        return terms

    def _denoising(
        self, output: Output, target_boxes: Tensor, target_labels: Tensor, positive: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """() weighted sum over layers and queries, of which those without a target do not count at all."""
        assert output.noise_logits is not None
        assert output.noise_boxes is not None
        assert output.noise_target is not None
        boxes = wide(output.noise_boxes)
        logits = output.noise_logits.to(boxes.dtype)
        row = output.noise_target.clamp_min(0)
        image = torch.arange(len(row), device=row.device)[:, None]
        used = (output.noise_target >= 0).unsqueeze(-1).to(boxes.dtype)
        background = (self.term.negative(logits) * used).sum((1, 2, 3))
        labels = target_labels[image, row].expand(len(logits), -1, -1)
        of_class = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        pairs = _Pairs(of_class, boxes, target_boxes[image, row].to(boxes.dtype), positive)
        return torch.stack(list(self._terms(pairs, background, size).values())).sum()

    def _numbers(self, found: Tensor, positive: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(2,) boxes, and denoising queries that are to find one, to divide by."""
        numbers = torch.stack((found, found if positive is None else positive.sum())).to(dtype)
        # Outside of training, processes may have different numbers of batches: none may wait for another.
        if self.training and dist.is_available() and dist.is_initialized():
            dist.all_reduce(numbers)
            numbers = numbers / dist.get_world_size()
        return numbers.clamp_min(1)
