import json
import sys
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lit_patchnerf.clip import embedding_table, open_provider
from lit_patchnerf.models.blocks import Decoded
from lit_patchnerf.patches import plan_geometry
from lit_patchnerf.query import (
    cell_box,
    embed_video,
    embedding_report,
    frame_curve,
    heat_picture,
    query_main,
    score_table,
    top_hits,
    write_heat,
)
from lit_patchnerf.splits import FrameSplit, split_frames
from lit_patchnerf.store import from_frames
from lit_patchnerf.video import VideoFacts, read_video, write_frames
from tests.helpers.errors import refused

RED, GREEN, BLUE = (220, 25, 25), (40, 165, 50), (40, 60, 215)
COUNT, ROWS, COLS = 40, 2, 3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(path) -> np.ndarray:
    picture = cv2.imread(str(path))
    assert picture is not None
    return picture


def clip() -> np.ndarray:
    """A green scene of 40 frames, 36 x 52, whose patch (1, 2) is red in frame 17 and whose patch (0, 0) is blue in 30.

    Its crop of 32 x 48 begins at row 2, column 2.
    """
    frames = np.empty((COUNT, 36, 52, 3), np.uint8)
    frames[:] = GREEN
    frames[17, 18:34, 34:50] = RED
    frames[30, 2:18, 2:18] = BLUE
    return frames


class StandIn:
    """A module that has learnt the toy's embeddings, and the colours, without an error."""

    def __init__(self, clip_dim: int | None = 32) -> None:
        facts = VideoFacts("drawn", (36, 52), COUNT, 10.0, "x")
        video = from_frames(clip(), facts, crop=(32, 48), grid=(ROWS, COLS))
        self.geometry, self.frames = video.geometry, video.frames
        self.table = embedding_table(video, "toy")
        self.hparams = {"frames": COUNT, "clip_dim": clip_dim, "fps": 10.0}
        self.asked: list[float] = []

    def embed(self, times):
        self.asked += times.tolist()
        return self.table[(times * (COUNT - 1)).round().long()]

    def decode(self, times):
        canvas = torch.from_numpy(self.frames)[(times * (COUNT - 1)).round().long()]
        return Decoded(canvas.permute(0, 3, 1, 2) / 255, None)


# ---- Scores ----------------------------------------------------------------------------------------------------------


def test_scores_against_loops():
    table, queries, negatives = random(3, 2, 4, 8), random(2, 8, seed=1), random(3, 8, seed=2)
    cos = F.cosine_similarity
    found = {
        "cosine": score_table(table, queries, score="cosine"),
        "relevancy": score_table(table, queries, negatives),
        "probability": score_table(table, queries, score="probability"),
    }
    for scores in found.values():
        assert scores.shape == (2, 3, 2, 4)
    for place in np.ndindex(3, 2, 4):
        patch = table[place]
        sims = torch.stack([cos(patch, query, dim=0) for query in queries])
        torch.testing.assert_close(found["cosine"][(slice(None), *place)], sims)
        torch.testing.assert_close(found["probability"][(slice(None), *place)], (100 * sims).softmax(0))
        for m, query in enumerate(sims):
            pairs = [torch.stack([query, cos(patch, n, dim=0)]) for n in negatives]
            expected = min((10 * pair).softmax(0)[0] for pair in pairs)
            torch.testing.assert_close(found["relevancy"][(m, *place)], expected)
    with pytest.raises(ValueError, match="negatives"):
        score_table(table, queries)
    with pytest.raises(ValueError, match="expected"):
        score_table(table, random(2, 7), score="cosine")


@pytest.mark.parametrize(
    "wanted",
    [{"grid": (2, 4)}, {"crop": (30, 40), "grid": (3, 3)}, {"patch": (16, 16)}, {"crop": (31, 33), "grid": (2, 2)}],
)
def test_boxes_are_where_the_pixels_came_from(wanted):
    geometry = plan_geometry((37, 53), **wanted)
    y, x = np.meshgrid(np.arange(37), np.arange(53), indexing="ij")
    frame = np.stack([y, x, np.ones_like(y)], -1).astype(np.uint8)
    # Padding marked, so that only real pixels count.
    canvas = np.zeros((*geometry.canvas, 3), np.uint8)
    canvas[geometry.content] = frame[geometry.region]
    (rows, cols), (h, w) = geometry.grid, geometry.patch
    for row in range(rows):
        for col in range(cols):
            patch = canvas[row * h : (row + 1) * h, col * w : (col + 1) * w].reshape(-1, 3)
            ys, xs = patch[patch[:, 2] == 1, 0], patch[patch[:, 2] == 1, 1]
            assert cell_box(geometry, row, col) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_hits_against_a_sort():
    geometry = plan_geometry((20, 30), grid=(2, 3))
    scores = random(5, 2, 3).round(decimals=1)  # with equal ones
    hits = top_hits(scores, geometry, 12)
    every = [(-scores[i].item(), i) for i in np.ndindex(5, 2, 3)]
    assert [(hit.frame, hit.row, hit.col) for hit in hits] == [place for _, place in sorted(every)][:12]
    for hit in hits:
        assert hit.score == scores[hit.frame, hit.row, hit.col].item()
        assert hit.box == cell_box(geometry, hit.row, hit.col)
    assert len(top_hits(scores, geometry, 99)) == 30
    with pytest.raises(ValueError, match="expected"):
        top_hits(scores[None], geometry)


def test_hits_that_lie_apart():
    geometry = plan_geometry((10, 20), grid=(1, 2))
    hits = top_hits(random(30, 1, 2), geometry, 60, apart=4)
    for i, a in enumerate(hits):
        assert all((a.row, a.col) != (b.row, b.col) or abs(a.frame - b.frame) > 4 for b in hits[:i])
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert hits[0] == top_hits(random(30, 1, 2), geometry, 1)[0]


def test_curve():
    scores = random(2, 6, 3, 4)
    torch.testing.assert_close(frame_curve(scores), torch.tensor([[s.max().item() for s in one] for one in scores]))


# ---- Heat maps -------------------------------------------------------------------------------------------------------


def test_heat_lies_over_its_patch_and_not_beyond_the_crop():
    geometry = plan_geometry((40, 60), crop=(32, 48), grid=(2, 3))
    frame = np.full((40, 60, 3), 100, np.uint8)
    scores = torch.zeros(2, 3)
    scores[1, 2] = 1
    before = frame.copy()
    picture = heat_picture(frame, scores, geometry, 0, 1)
    np.testing.assert_array_equal(frame, before)
    assert (picture.shape, picture.dtype) == (frame.shape, np.uint8)
    x1, y1, x2, y2 = cell_box(geometry, 1, 2)
    hot, cold = picture[(y1 + y2) // 2 + 4, (x1 + x2) // 2 + 4], picture[6, 8]
    assert int(hot[0]) > int(hot[2])  # red
    assert int(cold[2]) > int(cold[0])  # blue
    outside = np.ones((40, 60), bool)
    outside[geometry.region] = False
    assert (picture[outside] == 50).all()
    with pytest.raises(ValueError, match="expected"):
        heat_picture(frame[1:], scores, geometry, 0, 1)


def test_equal_and_impossible_scores_draw_something():
    geometry = plan_geometry((16, 16), grid=(2, 2))
    frame = np.zeros((16, 16, 3), np.uint8)
    for scores in (torch.full((2, 2), 0.3), torch.full((2, 2), float("nan"))):
        assert heat_picture(frame, scores, geometry, 0.3, 0.3).shape == frame.shape


def test_heat_video(tmp_path):
    geometry = plan_geometry((32, 48), grid=(2, 3))
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)
    scores = random(4, 2, 3)
    assert write_heat(tmp_path / "heat.mp4", frames, scores, geometry, 12) == (scores.min().item(), scores.max().item())
    found, facts = read_video(tmp_path / "heat.mp4")
    assert (found.shape, facts.fps) == (frames.shape, 12)
    refused(lambda: write_heat(tmp_path / "x.mp4", frames[:3], scores, geometry, 12), "3 frames", "expected 4")


# ---- The module's embeddings -----------------------------------------------------------------------------------------


def test_all_frames_are_embedded_at_their_times():
    module = StandIn()
    table = embed_video(module)
    torch.testing.assert_close(table, module.table.float())
    np.testing.assert_allclose(module.asked, np.arange(COUNT) / (COUNT - 1), rtol=1e-6)
    refused(lambda: embed_video(StandIn(clip_dim=None)), "data.embeddings")


def test_report_beside_baselines():
    true = random(10, 2, 2, 6).half()
    model = true.float() + 0.3 * random(10, 2, 2, 6, seed=1)
    split = split_frames(10, "1_1_2")
    texts = random(3, 6, seed=2)
    report = embedding_report(model, true, split, texts)
    assert list(report) == ["model", "nearest", "blend"]
    unit = F.normalize(true.float(), dim=-1)
    mean = unit.reshape(-1, 6).mean(0)
    nearest = unit[[0, 2, 4, 6, 8]]
    blend = (unit[[0, 2, 4, 6, 8]] + unit[[2, 4, 6, 8, 8]]) / 2
    for name, found in (("model", model[1::2]), ("nearest", nearest), ("blend", blend)):
        ours, target = F.normalize(found, dim=-1), unit[1::2]
        assert report[name]["cosine"] == pytest.approx(
            F.cosine_similarity(ours, target, dim=-1).mean().item(), abs=1e-5
        )
        centred = F.cosine_similarity(ours - mean, target - mean, dim=-1).mean().item()
        assert report[name]["centred_cosine"] == pytest.approx(centred, abs=1e-5)
    best = (unit[1::2].reshape(-1, 6) @ texts.T).argmax(0)
    ours = (F.normalize(model[1::2].reshape(-1, 6), dim=1) @ texts.T).argmax(0)
    assert report["model"]["top1"] == pytest.approx((best == ours).float().mean().item())
    assert set(embedding_report(model, true, split)["blend"]) == {"cosine", "centred_cosine"}


def test_report_where_nothing_is_held_out():
    true = random(4, 1, 2, 6)
    report = embedding_report(true, true, FrameSplit([0, 1, 2, 3], [], []))
    assert list(report) == ["model"]
    assert report["model"]["cosine"] == pytest.approx(1)
    with pytest.raises(ValueError, match="expected both"):
        embedding_report(true[:3], true, FrameSplit([0], [], [1]))


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A file that `load` opens as the stand-in, trained with the toy's embeddings."""
    path = tmp_path / "model.ckpt"
    torch.save({"datamodule_hyper_parameters": {"embeddings": "toy"}}, path)
    module = ModuleType("lit_patchnerf.module")
    module.load = lambda found: StandIn() if found == path else None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lit_patchnerf.module", module)
    return path


@pytest.fixture
def ask(checkpoint, tmp_path):
    def asked(*args) -> dict:
        words = ["--ckpt_path", checkpoint, "--device", "cpu", "--out", tmp_path / "out", *args]
        return query_main([str(word) for word in words])

    return asked


def test_a_text_finds_its_patch(ask, tmp_path, capsys):
    found = ask("--text", "a red square", "--top", 3)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    (query,) = found["queries"]
    best = query["hits"][0]
    assert (best["frame"], best["row"], best["col"], best["box"]) == (17, 1, 2, [34, 18, 50, 34])
    assert best["time_s"] == 1.7
    assert best["score"] > 0.5 > query["hits"][1]["score"]
    assert (query["best_frame"], len(query["curve"]), len(query["hits"])) == (17, COUNT, 3)
    assert (found["provider"], found["score"], len(found["negatives"])) == ("toy:32", "relevancy", 4)
    picture = read(tmp_path / "out" / best["picture"])
    assert picture.shape == (36, 52, 3)
    assert picture[26, 42].tolist() == list(RED[::-1])
    heat, facts = read_video(tmp_path / "out" / "heat.mp4")
    assert (heat.shape, facts.fps) == ((COUNT, 36, 52, 3), 10)
    assert "34 18 50 34" in capsys.readouterr().out


def test_several_texts_over_the_original_video(ask, tmp_path):
    write_frames(tmp_path / "frames", np.concatenate([clip(), clip()[:3]]))  # more than the network knows
    found = ask("--text", "red", "Blue!", "--video", tmp_path / "frames", "--score", "probability", "--top", 1)
    assert [q["hits"][0]["frame"] for q in found["queries"]] == [17, 30]
    for folder in ("01_red", "02_blue"):
        names = sorted(p.name for p in (tmp_path / "out" / folder).iterdir())
        assert len(names) == 2
        assert names[0] == "heat.mp4"
    assert found["queries"][1]["heat"] == "02_blue/heat.mp4"
    picture = read(tmp_path / "out" / found["queries"][1]["hits"][0]["picture"])
    assert picture[35, 51].tolist() == list(GREEN[::-1])  # what the crop left out is there too


def test_an_image_finds_its_patch(ask, tmp_path):
    cv2.imwrite(str(tmp_path / "blue.png"), np.full((9, 7, 3), BLUE[::-1], np.uint8))
    found = ask("--image", tmp_path / "blue.png", "--provider", "toy")
    assert found["score"] == "cosine"
    assert found["queries"][0]["query"] == "blue.png"
    hit = found["queries"][0]["hits"][0]
    assert (hit["frame"], hit["row"], hit["col"]) == (30, 0, 0)
    assert hit["score"] == pytest.approx(1, abs=1e-3)


def test_texts_of_a_file(ask, tmp_path, capsys):
    toy, path = open_provider("toy"), tmp_path / "texts.npz"
    words = ["red", "blue", "object"]
    np.savez(path, texts=np.array(words), text_embeddings=toy.encode_texts(words).numpy())
    found = ask("--texts", path, "--top", 1)
    assert [q["query"] for q in found["queries"]] == words
    assert found["score"] == "cosine"
    assert "no embedding of the negative 'things'" in capsys.readouterr().out
    found = ask("--texts", path, "--text", "blue", "--negatives", "object", "--top", 1)
    assert (found["score"], found["queries"][0]["best_frame"]) == ("relevancy", 30)
    refused(lambda: ask("--texts", path, "--score", "relevancy"), "object")
    refused(lambda: ask("--texts", path, "--text", "a cat"), "a cat")


def test_bad_questions(ask, checkpoint, tmp_path, monkeypatch):
    refused(lambda: ask(), "--text", "--image")
    refused(lambda: ask("--text", "a", "--image", "b.png"), "--image")
    refused(lambda: ask("--text", "a", "--top", 0), "--top is 0")
    refused(lambda: ask("--image", tmp_path / "none.png"), "none.png")
    refused(lambda: ask("--text", "a", "--score", "probability"), "at least two")
    refused(lambda: ask("--text", "a", "--provider", "toy:20"), "20 numbers", "expected 32")
    refused(lambda: ask("--text", "a", "--provider", "nothing"), "nothing")
    refused(lambda: ask("--text", "a", "--video", tmp_path / "none.mp4"), "none.mp4")
    write_frames(tmp_path / "small", clip()[:, 1:])
    refused(lambda: ask("--text", "a", "--video", tmp_path / "small"), "35x52", "36x52")
    write_frames(tmp_path / "short", clip()[:5])
    refused(lambda: ask("--text", "a", "--video", tmp_path / "short"), "5 frames", "40")
    cv2.imwrite(str(tmp_path / "x.png"), np.zeros((4, 4, 3), np.uint8))
    refused(lambda: ask("--image", tmp_path / "x.png", "--score", "relevancy"), "expected cosine")
    (tmp_path / "file").touch()
    refused(lambda: ask("--text", "a", "--out", tmp_path / "file" / "x"), "--out")
    with pytest.raises(ValueError, match="query: unrecognized"):
        ask("--txt", "a")
    refused(lambda: query_main(["--ckpt_path", str(tmp_path / "none.ckpt"), "--text", "a"]), "none.ckpt")
    torch.save({}, checkpoint)
    refused(lambda: ask("--text", "a"), "--provider")


def test_a_stored_provider_brings_its_weights(ask, checkpoint, monkeypatch):
    import lit_patchnerf.query as query

    seen = []

    def opened(text, weights, device):
        seen.append((text, weights))
        return open_provider("toy")

    monkeypatch.setattr(query, "open_provider", opened)
    stored = {"embeddings": "open_clip:ViT-B-16", "embeddings_weights": "w.pt"}
    torch.save({"datamodule_hyper_parameters": stored}, checkpoint)
    ask("--text", "red", "--top", 1)
    ask("--text", "red", "--top", 1, "--provider", "toy")
    assert seen == [("open_clip:ViT-B-16", "w.pt"), ("toy", None)]


def test_namespaces_serve_as_hyperparameters():
    module = SimpleNamespace(hparams={"clip_dim": 4, "frames": 1}, embed=lambda times: random(len(times), 1, 1, 4))
    assert embed_video(module).shape == (1, 1, 1, 4)  # type: ignore[arg-type]
