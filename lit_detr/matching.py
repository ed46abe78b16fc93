"""Which query answers for which box: costs of all decoder layers in one pass, exact assignment on the host.

Targets of all images stand in one row without padding, and each is compared only with the queries of its own image, in
all layers at once. So nothing that cannot match is calculated or copied, and what is held at a time is cut by targets
to a fixed budget, however dense the images are. The device is waited for once, by threads of their own; what needs no
match is launched meanwhile.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_common.kernels import usable
from lit_detr.boxes import SMALLEST, cxcywh_to_xyxy, iou_and_giou, nwd, to_pixels
from lit_detr.samples import Output, Targets

__all__ = ["ClassKind", "ClassTerm", "Matcher", "Matches", "Pending", "stack_stages"]

ClassKind = Literal["focal", "vfl", "mal"]

LARGEST = 1e6  # cost in place of NaN and infinity: dearer than any real one, and sums of it are exact enough
PLANES = 24  # float32 values alive per pair of query and target while costs are calculated, rounded up
CELLS = 2**16  # costs for which a thread is worth its start: some 0.2 ms of assignment
_DEFAULTS: dict[ClassKind, tuple[float, float]] = {"focal": (0.25, 2.0), "vfl": (0.75, 2.0), "mal": (1.0, 1.5)}


@dataclass(frozen=True)
class ClassTerm:
    """Classification of one logit x, p = sigmoid(x), as an object of quality q (its IoU) or as background.

    - `focal`: -alpha (1 - p)^gamma log p, and -(1 - alpha) p^gamma log(1 - p); q is not looked at.
    - `vfl` (varifocal): -q (q log p + (1 - q) log(1 - p)), and -alpha p^gamma log(1 - p).
    - `mal` (matchability-aware): -(q^gamma log p + (1 - q^gamma) log(1 - p)), and -alpha p^gamma log(1 - p).

    The factor p^gamma of the last two is a weight without gradient, as in RT-DETR and DEIM.

    Args:
        kind: One of the three.
        alpha: Balance of objects and background: 0.25, 0.75 and 1 unless told.
        gamma: Exponent: 2, 2 and 1.5 unless told.

    Raises:
        InputError: A name or number out of range.

    Source:
        arXiv 1708.02002, arXiv 2008.13367, arXiv 2412.04234.

    Example:
        >>> term = ClassTerm("mal", gamma=2.0)
        >>> term.positive(torch.zeros(1), torch.tensor([0.5])), term.negative(torch.zeros(1))
        (tensor([0.6931]), tensor([0.1733]))
    """

    kind: ClassKind = "focal"
    alpha: float | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _DEFAULTS:
            raise InputError(f"class_kind is {self.kind!r}, expected one of {', '.join(get_args(ClassKind))}")
        alpha, gamma = self.numbers
        top = 1.0 if self.kind == "focal" else math.inf
        if not 0 <= alpha <= top or math.isinf(alpha):
            raise InputError(
                f"class_kind {self.kind}: alpha is {alpha}, expected {'0 to 1' if top == 1 else '0 or more'}"
            )
        if gamma != 0 and not 1 <= gamma < math.inf:
            raise InputError(f"class_kind {self.kind}: gamma is {gamma}, expected 0 or at least 1")

    @property
    def numbers(self) -> tuple[float, float]:
        """Alpha and gamma."""
        alpha, gamma = _DEFAULTS[self.kind]
        return alpha if self.alpha is None else self.alpha, gamma if self.gamma is None else self.gamma

    def positive(self, logits: Tensor, quality: Tensor) -> Tensor:
        """As an object of this quality, 0 to 1, of the same shape and without gradient."""
        alpha, gamma = self.numbers
        if self.kind == "focal":
            return alpha * torch.sigmoid(-logits).pow(gamma) * F.softplus(-logits)
        share = quality if self.kind == "vfl" else quality.pow(gamma)
        entropy = F.softplus(logits) - share * logits
        return quality * entropy if self.kind == "vfl" else entropy

    def negative(self, logits: Tensor) -> Tensor:
        """As background."""
        alpha, gamma = self.numbers
        if self.kind == "focal":
            return (1 - alpha) * torch.sigmoid(logits).pow(gamma) * F.softplus(logits)
        return alpha * torch.sigmoid(logits.detach()).pow(gamma) * F.softplus(logits)


class Matches(NamedTuple):
    """The pairs of every stage (decoder layers, then the encoder's proposals) and image, packed.

    Attributes:
        query: (S, B, M) int64 with M = min(T, Q), in the order of `target`; 0 beyond the count.
        target: (S, B, M) int64 row in the targets, ascending; 0 beyond the count.
        lengths: (B,) int64 on the device, the same in every stage: min(boxes of the image, Q).
        counts: The same on the host.
    """

    query: Tensor
    target: Tensor
    lengths: Tensor
    counts: list[int]

    @property
    def valid(self) -> Tensor:
        """(B, M) bool."""
        return torch.arange(self.query.shape[2], device=self.query.device) < self.lengths[:, None]


class Pending:
    """An assignment under way."""

    def __init__(self, jobs: list[Future[None]], index: Tensor, targets: Targets, queries: int) -> None:
        self._jobs, self._index, self._targets, self._queries = jobs, index, targets, queries
        self._matches: Matches | None = None

    def result(self) -> Matches:
        """Wait for the assignment and send it to the device, without waiting for that."""
        if self._matches is None:
            for job in self._jobs:
                job.result()
            targets = self._targets
            query, target = self._index.to(targets.boxes.device, non_blocking=True)
            counts = [min(n, self._queries) for n in targets.counts]
            self._matches = Matches(query, target, targets.lengths.clamp_max(self._queries), counts)
        return self._matches


def stack_stages(output: Output) -> tuple[Tensor, Tensor]:
    """Decoder layers and the encoder's proposals along one axis.

    Returns:
        logits: (S, B, Q, K) with S = L + 1, the proposals last.
        boxes: (S, B, Q, 4).
    """
    logits = torch.cat((output.logits, output.encoder_logits[None]))
    return logits, torch.cat((output.boxes, output.encoder_boxes[None]))


class Matcher:
    """Exact one-to-one assignment of boxes to queries, in every stage for itself.

    The cost of a pair is a sum of what the pair changes in the loss: classification as that object rather than as
    background, L1 of centre and size as shares, and the likenesses GIoU and NWD, negative. NaN and infinite costs
    become large ones, so that a query that gives them is taken last. Of more boxes than queries the dearest are left
    out.

    Args:
        class_cost: Factor of the classification.
        l1: Factor of the L1 distance.
        giou: Factor of GIoU.
        nwd: Factor of NWD.
        class_kind: See `ClassTerm`. RT-DETR, D-FINE and DEIM match by `focal`, whatever they train with; the others
            take the IoU of each pair for its quality.
        alpha: Of `ClassTerm`.
        gamma: Of `ClassTerm`.
        nwd_constant: C of NWD in pixels of the network's input; needed where `nwd` is above 0.
        memory_mib: Device memory that the calculation may take at a time. Where all pairs need more than that they are
            calculated and copied in several parts; there is one wait all the same.
        workers: Threads; as many as this process may use cores, at most 16, unless told.

    Raises:
        InputError: A number out of range, or no cost at all.

    Source:
        Carion et al., arXiv 2005.12872; class cost of Zhu et al., arXiv 2010.04159.

    Example:
        >>> from lit_detr.samples import pack_targets
        >>> boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1]])
        >>> logits = torch.zeros(1, 1, 3, 2)
        >>> matches = Matcher()(logits, boxes[None, None], pack_targets([boxes[1:]], [torch.ones(2)]), (64, 64))
        >>> matches.query[0, 0, :2].tolist(), matches.target[0, 0, :2].tolist(), matches.counts
        ([1, 2], [0, 1], [2])
    """

    def __init__(
        self,
        *,
        class_cost: float = 2.0,
        l1: float = 5.0,
        giou: float = 2.0,
        nwd: float = 0.0,
        class_kind: ClassKind = "focal",
        alpha: float | None = None,
        gamma: float | None = None,
        nwd_constant: float | None = None,
        memory_mib: float = 64.0,
        workers: int | None = None,
    ) -> None:
        costs = {"class_cost": class_cost, "l1": l1, "giou": giou, "nwd": nwd}
        for name, value in costs.items():
            if not 0 <= value < math.inf:
                raise InputError(f"matcher: {name} is {value}, expected 0 or more")
        if not any(costs.values()):
            raise InputError("matcher: all costs are 0, expected one above it")
        check_nwd("matcher", nwd, nwd_constant)
        if not memory_mib > 0:
            raise InputError(f"matcher: memory_mib is {memory_mib}, expected more than 0")
        if workers is not None and workers < 1:
            raise InputError(f"matcher: workers is {workers}, expected 1 or more")
        self.class_cost, self.l1, self.giou, self.nwd = class_cost, l1, giou, nwd
        self.term = ClassTerm(class_kind, alpha, gamma)
        self.nwd_constant = nwd_constant
        self.memory_mib = memory_mib
        self.workers = min(16, _cores()) if workers is None else workers

    def __call__(self, logits: Tensor, boxes: Tensor, targets: Targets, size: tuple[int, int]) -> Matches:
        """`start` and its result."""
        return self.start(logits, boxes, targets, size).result()

    @torch.no_grad()
    def start(self, logits: Tensor, boxes: Tensor, targets: Targets, size: tuple[int, int]) -> Pending:
        """Launch the costs and their copy; threads take over as soon as it has arrived.

        Args:
            logits: (S, B, Q, K) of any floating type.
            boxes: (S, B, Q, 4) cx cy w h as shares of the padded image.
            targets: On the same device.
            size: (height, width) of the padded image in pixels.
        """
        stages, batch, queries = boxes.shape[:3]
        cuda = boxes.device.type == "cuda"
        width = min(targets.boxes.shape[1], queries)
        index = torch.zeros(2, stages, batch, width, dtype=torch.int64, pin_memory=cuda)
        total = sum(targets.counts)
        if not total:
            return Pending([], index, targets, queries)
        with torch.autocast(boxes.device.type, enabled=False):
            # (N, S, Q), targets first: a part of the targets is one piece of memory, and scipy likes the wide way.
            costs = torch.empty(total, stages, queries, pin_memory=cuda)
            image, row = _flat_rows(targets)
            planes = 1 if usable(boxes) else PLANES
            step = max(1, int(self.memory_mib * 2**20) // (4 * planes * stages * queries))
            for first in range(0, total, step):
                part = slice(first, first + step)
                costs[part].copy_(self._costs(logits, boxes, targets, image[part], row[part], size), non_blocking=True)
        event = torch.cuda.Event(blocking=True) if cuda else None  # a thread that waits for it sleeps
        if event is not None:
            event.record(torch.cuda.current_stream(boxes.device))
        blocks = _blocks(costs.numpy(), index.numpy(), targets.counts)
        pool = _pool(self.workers)
        threads = min(self.workers, stages * batch, -(-costs.numel() // CELLS))
        jobs = [pool.submit(_solve, event, blocks) for _ in range(threads)]
        return Pending(jobs, index, targets, queries)

    def _costs(
        self, logits: Tensor, boxes: Tensor, targets: Targets, image: Tensor, row: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """(n, S, Q) float32 of these targets with the queries of their images."""
        if usable(boxes):
            return self._costs_by_kernel(logits, boxes, targets, image, row, size)
        found = boxes.transpose(0, 1)[image].float()
        wanted = targets.boxes[image, row][:, None, None].float()
        terms: list[Tensor] = []
        quality = found  # which a focal term does not look at
        if self.giou or (self.class_cost and self.term.kind != "focal"):
            quality, giou = iou_and_giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
            terms.append(giou.mul_(-self.giou))
        if self.nwd and self.nwd_constant is not None:
            likeness = nwd(to_pixels(found, size), to_pixels(wanted, size), self.nwd_constant)
            terms.append(likeness.mul_(-self.nwd))
        if self.l1:
            terms.append((found - wanted).abs_().sum(-1).mul_(self.l1))
        if self.class_cost:
            x = logits.permute(1, 3, 0, 2)[image, targets.labels[image, row]].float()
            terms.append((self.term.positive(x, quality) - self.term.negative(x)).mul_(self.class_cost))
        cost = terms.pop()
        for term in terms:
            cost += term
        return cost.nan_to_num_(LARGEST, LARGEST, -LARGEST)

    def _costs_by_kernel(
        self, logits: Tensor, boxes: Tensor, targets: Targets, image: Tensor, row: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """The same in one pass."""
        from lit_detr.matching_kernels import pair_costs

        alpha, gamma = self.term.numbers
        return pair_costs(
            logits,
            boxes,
            targets.boxes[image, row],
            image,
            targets.labels[image, row],
            kind=self.term.kind,
            factors=(self.class_cost, self.l1, self.giou, self.nwd),
            alpha=alpha,
            gamma=gamma,
            size=size,
            nwd_constant=self.nwd_constant,
            smallest=SMALLEST,
            largest=LARGEST,
        )


def check_nwd(what: str, weight: float, constant: float | None) -> None:
    """Refuse an NWD without its constant."""
    if weight and constant is None:
        raise InputError(
            f"{what}: nwd is {weight} and nwd_constant missing, expected about the mean object size in pixels"
        )
    if constant is not None and not 0 < constant < math.inf:
        raise InputError(f"{what}: nwd_constant is {constant}, expected pixels above 0")


def _flat_rows(targets: Targets) -> tuple[Tensor, Tensor]:
    """Image and row of every box of a batch, (N,) each on the device, from the counts on the host."""
    counts = targets.counts
    image = np.repeat(np.arange(len(counts)), counts)
    flat = torch.from_numpy(np.stack((image, np.concatenate([np.arange(n) for n in counts]))))
    device = targets.boxes.device
    image, row = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    return image, row


_Block = tuple[NDArray[np.float32], NDArray[np.int64]]


def _blocks(costs: NDArray[np.float32], index: NDArray[np.int64], counts: list[int]) -> Iterator[_Block]:
    """Costs (n, Q) of every stage and image with boxes, and where its pairs (2, M) go; the most boxes first."""
    ends = np.cumsum(counts)
    order = sorted((b for b, n in enumerate(counts) if n), key=lambda b: -counts[b])
    stages = range(costs.shape[1])
    # An iterator of a list, which threads may share.
    return iter([(costs[ends[b] - counts[b] : ends[b], s], index[:, s, b]) for b in order for s in stages])


def _solve(event: torch.cuda.Event | None, blocks: Iterator[_Block]) -> None:
    """Take blocks until none is left; several threads do."""
    if event is not None:
        event.synchronize()
    for costs, index in blocks:
        rows, columns = linear_sum_assignment(costs)  # without the interpreter's lock
        index[0, : len(rows)], index[1, : len(rows)] = columns, rows


def _cores() -> int:
    """Cores for this process, divided by the processes that torchrun started on this host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Kept between steps, and outside of the matcher, so that this can be copied and pickled."""
    return ThreadPoolExecutor(workers, thread_name_prefix="lit_detr-matcher")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
