"""Similarities of embeddings against loops, scipy and formulas written out."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lit_patchnerf.similarity import (
    NEGATIVES,
    blend_embeddings,
    centred_cosine,
    cosine,
    label_probabilities,
    mean_embedding,
    ranking_agreement,
    relevancy,
    similarity_report,
    text_scores,
)
from lit_patchnerf.splits import blend_neighbours, nearest_neighbours


def embeddings(*shape, seed=0, offset=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


def one_cosine(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_cosine():
    x, y = embeddings(2, 5, 16), embeddings(2, 5, 16, seed=1)
    expected = [[one_cosine(a, b) for a, b in zip(p, q, strict=True)] for p, q in zip(x, y, strict=True)]
    np.testing.assert_allclose(cosine(x, y).numpy(), expected, atol=1e-6)
    torch.testing.assert_close(cosine(7 * x, 0.01 * y), cosine(x, y))
    assert cosine(x.half(), y.half()).dtype == torch.float32
    assert cosine(torch.zeros(1, 4), torch.ones(1, 4)).item() == 0


def test_centred_cosine_is_without_what_all_share():
    target = embeddings(40, 8, offset=5.0)
    other = embeddings(40, 8, seed=1, offset=5.0)  # another video of the same kind: knows nothing about the patch
    mean = mean_embedding(target)
    unit = [(t / t.norm()).double() for t in target]
    np.testing.assert_allclose(mean.numpy(), torch.stack(unit).mean(0).numpy(), atol=1e-6)
    expected = [one_cosine(o / o.norm() - mean, t / t.norm() - mean) for o, t in zip(other, target, strict=True)]
    np.testing.assert_allclose(centred_cosine(other, target, mean).numpy(), expected, atol=1e-5)
    assert cosine(other, target).mean() > 0.9
    assert abs(centred_cosine(other, target, mean).mean()) < 0.25
    torch.testing.assert_close(centred_cosine(target, target, mean), torch.ones(40))


def test_a_prediction_of_the_mean_is_worth_nothing():
    target = embeddings(6, 4, offset=3.0)
    same = target[:1].expand(6, -1)  # one embedding for the whole video: predicting it exactly is no achievement
    assert (centred_cosine(same, same, mean_embedding(same)) == 0).all()
    mean = mean_embedding(target)
    # The mean is shorter than 1, so that of the normalised mean something is left, along itself.
    assert centred_cosine(mean.expand(6, -1), target, mean).mean().abs() < cosine(mean.expand(6, -1), target).mean()


def test_relevancy_is_lerfs():
    x, query, negatives = embeddings(7, 16), embeddings(3, 16, seed=1), embeddings(len(NEGATIVES), 16, seed=2)
    value = relevancy(x, query, negatives)
    assert value.shape == (3, 7)
    for m in range(3):
        for n in range(7):
            positive = 10 * one_cosine(query[m], x[n])
            shares = [
                math.exp(positive) / (math.exp(positive) + math.exp(10 * one_cosine(negative, x[n])))
                for negative in negatives
            ]
            assert value[m, n].item() == pytest.approx(min(shares), abs=1e-5)
    torch.testing.assert_close(relevancy(x, negatives[:1], negatives[:1]), torch.full((1, 7), 0.5))


def test_labels_are_clips_softmax():
    x, labels = embeddings(5, 16), embeddings(3, 16, seed=1)
    value = label_probabilities(x, labels)
    scores = np.array([[math.exp(100 * one_cosine(label, one)) for label in labels] for one in x])
    np.testing.assert_allclose(value.numpy(), scores / scores.sum(1, keepdims=True), rtol=1e-3, atol=1e-6)


def test_scores_do_not_suffer_from_autocast():
    x, texts = embeddings(5, 16), embeddings(3, 16, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = text_scores(x, texts), relevancy(x, texts, texts)
    torch.testing.assert_close(inside, (text_scores(x, texts), relevancy(x, texts, texts)), rtol=0, atol=0)


@pytest.mark.parametrize("count", [3, 30])
@pytest.mark.parametrize("ties", [False, True])
def test_ranking_agreement(count, ties):
    ours, true = embeddings(4, count), embeddings(4, count, seed=1)
    ours = true + 0.5 * ours
    if ties:
        ours, true = ours.round(), true.round()
    found = ranking_agreement(ours, true)
    assert found["spearman"] == pytest.approx(
        np.mean([spearmanr(a, b).statistic for a, b in zip(ours.numpy(), true.numpy(), strict=True)])
    )
    orders = [
        [sorted(range(count), key=lambda i, row=row: (-row[i].item(), i)) for row in scores] for scores in (ours, true)
    ]
    pairs = list(zip(*orders, strict=True))
    assert found["top1"] == pytest.approx(np.mean([a[0] == b[0] for a, b in pairs]))
    few = min(5, count)
    assert found["top5"] == pytest.approx(np.mean([len(set(a[:5]) & set(b[:5])) / few for a, b in pairs]))


def test_rankings_at_their_ends():
    scores = embeddings(3, 20)
    assert ranking_agreement(scores, 2 * scores + 1) == pytest.approx({"top1": 1, "top5": 1, "spearman": 1})
    assert ranking_agreement(-scores, scores) == pytest.approx({"top1": 0, "top5": 0, "spearman": -1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(ranking_agreement(torch.ones(1, 9), embeddings(1, 9))["spearman"])


def test_baselines_of_embeddings():
    table = embeddings(6, 2, 3, 8)
    unit = torch.nn.functional.normalize(table, dim=-1)
    train, wanted = [0, 1, 4], [2, 3, 5]
    torch.testing.assert_close(blend_embeddings(table, nearest_neighbours(wanted, train)), unit[[1, 4, 4]])
    mixed = torch.stack([unit[1] * 2 / 3 + unit[4] / 3, unit[1] / 3 + unit[4] * 2 / 3, unit[4]])
    expected = mixed / mixed.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(blend_embeddings(table, blend_neighbours(wanted, train)), expected)
    assert blend_embeddings(table.half(), blend_neighbours(wanted, train)).dtype == torch.float32


def test_the_report_shows_what_the_plain_cosine_hides():
    g = torch.Generator().manual_seed(0)
    target = 4 + torch.randn(60, 8, generator=g)
    mean, texts = mean_embedding(target), embeddings(3, 8, seed=2)
    noise = torch.randn(60, 8, generator=g)
    report = similarity_report({"model": target + 0.2 * noise, "nearest": 4 + noise}, target, mean, texts)
    model, nearest = report["model"], report["nearest"]
    assert list(model) == ["cosine", "centred_cosine", "top1", "top5", "spearman"]
    assert nearest["cosine"] > 0.9
    assert abs(nearest["centred_cosine"]) < 0.2
    assert model["centred_cosine"] > 0.9
    assert model["spearman"] > nearest["spearman"] + 0.5
    assert list(similarity_report({"model": target}, target, mean)["model"]) == ["cosine", "centred_cosine"]


def test_wrong_input_is_named():
    x = embeddings(4, 8)
    with pytest.raises(ValueError, match="pairs"):
        cosine(x, x[:2])
    with pytest.raises(ValueError, match=r"\(N, D\) and \(M, D\)"):
        text_scores(x, embeddings(2, 7))
    with pytest.raises(ValueError, match="negatives"):
        relevancy(x, x, x[:0])
    for scores in (torch.ones(4), torch.ones(0, 4)):
        with pytest.raises(ValueError, match=r"\(M, N\)"):
            ranking_agreement(scores, scores)
