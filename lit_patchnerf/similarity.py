"""How well embeddings of patches agree with those of the CLIP tower, and how they answer a query in words.

The plain cosine is nearly trivial: all patches of a video resemble each other, and a text lies far from every image. So
figures are also given centred, that is without what all patches of the video share, and for rankings, which is what a
query uses. Both are shown beside predictors without a network: the nearest trained frame and the blend of two.

Embeddings are (..., D) of any floating type and any length. Similarities are computed in float32, under autocast too;
only `ranking_agreement` and `similarity_report` wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from lit_patchnerf.splits import Neighbours

__all__ = [
    "NEGATIVES",
    "blend_embeddings",
    "centred_cosine",
    "cosine",
    "label_probabilities",
    "mean_embedding",
    "ranking_agreement",
    "relevancy",
    "similarity_report",
    "text_scores",
]

#: The words that LERF compares a query with.
NEGATIVES = ("object", "things", "stuff", "texture")


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Cosine of pairs, 0 where one of them is zero.

    Args:
        prediction: (..., D).
        target: Likewise.

    Returns:
        (...) float32, -1 to 1.

    >>> cosine(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])).round(decimals=4)
    tensor([0.7071, 0.0000])
    """
    _check_pairs(prediction, target)
    return (_unit(prediction) * _unit(target)).sum(-1)


def mean_embedding(table: Tensor) -> Tensor:
    """Mean of the normalised embeddings of a video: (..., D) to (D,) float32.

    >>> mean_embedding(torch.tensor([[[2.0, 0.0], [0.0, 5.0]]]))
    tensor([0.5000, 0.5000])
    """
    return _unit(table).flatten(0, -2).mean(0)


def centred_cosine(prediction: Tensor, target: Tensor, mean: Tensor) -> Tensor:
    """Cosine of what distinguishes the embeddings from the mean of their video.

    Args:
        prediction: (..., D).
        target: Likewise.
        mean: (D,), `mean_embedding` of the true embeddings of the whole video.

    Returns:
        (...) float32, -1 to 1; 0 for a prediction of the mean itself.

    Example:
        >>> target = torch.nn.functional.normalize(torch.tensor([[10.0, 1.0], [10.0, -1.0]]), dim=1)
        >>> mean = mean_embedding(target)
        >>> cosine(target.flip(0), target).round(decimals=2), centred_cosine(target.flip(0), target, mean)
        (tensor([0.9800, 0.9800]), tensor([-1., -1.]))
    """
    _check_pairs(prediction, target)
    return cosine(_centred(prediction, mean), _centred(target, mean))


def text_scores(embeddings: Tensor, texts: Tensor) -> Tensor:
    """Cosine of every text with every patch.

    Args:
        embeddings: (N, D) of patches.
        texts: (M, D).

    Returns:
        (M, N) float32.

    Raises:
        ValueError: The lengths of the embeddings differ.
    """
    if embeddings.ndim != 2 or texts.ndim != 2 or embeddings.shape[1] != texts.shape[1]:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} and texts {tuple(texts.shape)}: expected (N, D) and (M, D)"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        return _unit(texts.to(embeddings.device)) @ _unit(embeddings).T


def relevancy(embeddings: Tensor, queries: Tensor, negatives: Tensor, *, scale: float = 10.0) -> Tensor:
    """LERF's relevancy: how surely a patch shows the query rather than anything at all.

    The share of the query in a softmax with each negative by itself, and of these the smallest. Below 0.5 a patch is
    more like some negative.

    Args:
        embeddings: (N, D) of patches.
        queries: (M, D) of texts.
        negatives: (K, D) of texts, those of `NEGATIVES` in LERF; K at least 1.
        scale: Of the cosines in the softmax.

    Returns:
        (M, N) float32, 0 to 1.

    Raises:
        ValueError: There is no negative, or the lengths differ.

    Source:
        LERF (arXiv 2303.09553), section 3.3.

    Example:
        >>> axes = torch.eye(3)
        >>> relevancy(axes[:2], axes[:1], axes[1:]).round(decimals=4)
        tensor([[1., 0.]])
    """
    if not len(negatives):
        raise ValueError("negatives: expected at least one")
    # The smallest share is that against the most similar negative, and a softmax of two is a sigmoid.
    strongest = text_scores(embeddings, negatives).amax(0)
    return torch.sigmoid(scale * (text_scores(embeddings, queries) - strongest))


def label_probabilities(embeddings: Tensor, labels: Tensor, *, scale: float = 100.0) -> Tensor:
    """Softmax over a set of labels for each patch.

    Args:
        embeddings: (N, D) of patches.
        labels: (M, D) of texts.
        scale: Of the cosines, 100 in CLIP.

    Returns:
        (N, M) float32 that sum to 1.

    Source:
        CLIP (arXiv 2103.00020).
    """
    return F.softmax(scale * text_scores(embeddings, labels).T, dim=1)


def ranking_agreement(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """How far two rankings of the same patches agree, the mean over queries.

    Args:
        prediction: (M, N) scores of M queries for N patches.
        target: Likewise, those of the true embeddings.

    Returns:
        `top1`: share of queries whose best patch is the same; `top5`: share of the five best patches (all, if there are
        fewer) that are among the five best predicted; `spearman`: rank correlation, NaN where all scores of a query are
        equal. Of equal scores the earlier patch is the better one, but for `spearman`, where they share their rank.

    Raises:
        ValueError: Shapes differ, or there is nothing to rank.

    Example:
        >>> ranking_agreement(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[2.0, 3.0, 1.0]]))
        {'top1': 0.0, 'top5': 1.0, 'spearman': 0.5}
    """
    if prediction.ndim != 2 or prediction.shape != target.shape or not prediction.numel():
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: expected both as (M, N) scores"
        )
    ours, true = (scores.detach().double().cpu().numpy() for scores in (prediction, target))
    best_ours, best_true = (np.argsort(-scores, axis=1, kind="stable")[:, :5] for scores in (ours, true))
    shared = (best_ours[:, :, None] == best_true[:, None, :]).any(2).mean()
    return {
        "top1": float((best_ours[:, 0] == best_true[:, 0]).mean()),
        "top5": float(shared),
        "spearman": _spearman(ours, true),
    }


def blend_embeddings(table: Tensor, neighbours: Neighbours) -> Tensor:
    """What the stored embeddings of the neighbours alone would give: the baseline that a network has to beat.

    Args:
        table: (T, ..., D) true embeddings, of which those of trained frames are read.
        neighbours: Of V wanted frames: `nearest_neighbours` for the nearest trained frame, `blend_neighbours` for the
            interpolation of two.

    Returns:
        (V, ..., D) float32 on the table's device, normalised.

    Example:
        >>> from lit_patchnerf.splits import blend_neighbours, nearest_neighbours
        >>> table = torch.tensor([[2.0, 0.0], [9.0, 9.0], [0.0, 1.0]])
        >>> blend_embeddings(table, blend_neighbours([1], [0, 2]))
        tensor([[0.7071, 0.7071]])
        >>> blend_embeddings(table, nearest_neighbours([1], [0, 2]))
        tensor([[1., 0.]])
    """
    indices, weights = (torch.from_numpy(part).to(table.device) for part in neighbours)
    shape = (-1, *(1,) * (table.ndim - 1))
    total = torch.zeros(len(indices), *table.shape[1:], device=table.device)
    for at, share in zip(indices.unbind(1), weights.unbind(1), strict=True):
        total += _unit(table[at]) * share.reshape(shape)
    return _unit(total)


def similarity_report(
    predictions: Mapping[str, Tensor], target: Tensor, mean: Tensor, texts: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """The figures of the network beside those of its baselines, over the same held-out patches.

    Args:
        predictions: (N, D) embeddings by the name of their predictor, such as `model`, `nearest` and `blend`.
        target: (N, D) true embeddings.
        mean: (D,), `mean_embedding` of the whole video.
        texts: (M, D) queries; without any there are no rankings.

    Returns:
        For each predictor `cosine`, `centred_cosine` and, with texts, what `ranking_agreement` says.

    Example:
        >>> target = torch.eye(3)
        >>> report = similarity_report({"model": target}, target, mean_embedding(target), texts=target)
        >>> {name: round(value, 3) for name, value in report["model"].items()}
        {'cosine': 1.0, 'centred_cosine': 1.0, 'top1': 1.0, 'top5': 1.0, 'spearman': 1.0}
    """
    report = {}
    for name, prediction in predictions.items():
        report[name] = {
            "cosine": cosine(prediction, target).mean().item(),
            "centred_cosine": centred_cosine(prediction, target, mean).mean().item(),
        }
        if texts is not None:
            report[name] |= ranking_agreement(text_scores(prediction, texts), text_scores(target, texts))
    return report


def _spearman(prediction: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    # Ranks by scipy and the correlation here: `spearmanr` warns where a ranking is constant, and takes no batch of
    # pairs without computing every pair of rows.
    ranks = [rankdata(scores, axis=1) for scores in (prediction, target)]
    ours, true = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    scale = np.sqrt((ours**2).sum(1) * (true**2).sum(1))
    scale[scale == 0] = np.nan
    return float(((ours * true).sum(1) / scale).mean())


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


def _centred(embedding: Tensor, mean: Tensor) -> Tensor:
    """Minus the mean; zero where only the rounding of float32 is left, which would have a direction of its own."""
    centred = _unit(embedding) - mean.float()
    return centred * (torch.linalg.vector_norm(centred, dim=-1, keepdim=True) > 1e-6)


def _check_pairs(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: expected pairs of embeddings"
        )
