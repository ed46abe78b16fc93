import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_patchnerf.patches import plan_geometry
from lit_patchnerf.splits import (
    blend_frames,
    blend_neighbours,
    nearest_neighbours,
    parse_split,
    split_frames,
)
from lit_patchnerf.video import read_video
from tests.helpers.errors import refused

# Written out by hand for 21 frames, so two whole blocks of ten and one frame more.
TABLE = {
    "6_6_10": ([0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 20], [], [6, 7, 8, 9, 16, 17, 18, 19]),
    "9_10_10": ([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20], [9, 19], []),
    "9_9_10": ([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20], [], [9, 19]),
    "6_8_10": ([0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 20], [6, 7, 16, 17], [8, 9, 18, 19]),
    "1_1_2": ([0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20], [], [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]),
    "1_1_1": (list(range(21)), [], []),
}


@pytest.mark.parametrize("text", TABLE)
def test_roles_are_those_of_the_table(text):
    if TABLE[text][2]:
        found = split_frames(21, text)
    else:
        with pytest.warns(UserWarning, match=f"{text} holds out none of 21 frames"):
            found = split_frames(21, text)
    assert tuple(found) == TABLE[text]


@pytest.mark.parametrize(
    ("count", "text", "sizes"),
    [
        (192, "6_6_10", (116, 0, 76)),
        (192, "9_10_10", (173, 19, 0)),
        (132, "6_6_10", (80, 0, 52)),
        (132, "1_1_2", (66, 0, 66)),
        (132, "9_9_10", (119, 0, 13)),
    ],
)
@pytest.mark.filterwarnings("ignore:data.data_split")
def test_counts_that_were_published(count, text, sizes):
    assert tuple(map(len, split_frames(count, text))) == sizes


def test_shuffled_roles_are_those_of_a_shuffled_list():
    names = [f"{i:03d}.png" for i in range(50)]
    random.Random(3).shuffle(names)
    train = [n for i, n in enumerate(names) if i % 10 < 6]
    val = [n for i, n in enumerate(names) if i % 10 >= 8]
    found = split_frames(50, "6_8_10", shuffle_seed=3)
    assert [f"{i:03d}.png" for i in found.train] == sorted(train)
    assert [f"{i:03d}.png" for i in found.val] == sorted(val)
    assert sorted([*found.train, *found.unused, *found.val]) == list(range(50))
    assert found != split_frames(50, "6_8_10")
    assert found == split_frames(50, "6_8_10", shuffle_seed=3)


def test_a_clip_shorter_than_the_trained_part_of_a_block_warns():
    with pytest.warns(UserWarning, match="holds out none of 5"):
        assert split_frames(5, "6_6_10").val == []


@pytest.mark.parametrize(
    "text", ["", "6_10", "6_6_10_2", "a_b_c", "7_6_10", "6_11_10", "0_0_1", "-1_6_10", "6_6_10 ", 6]
)
def test_other_texts_are_refused(text):
    refused(lambda: parse_split(text), "data.data_split", repr(str(text)), "1 <= a <= b <= c")


def test_no_frame_is_refused():
    refused(lambda: split_frames(0, "1_1_2"), "data.video")


# ---- Neighbours ------------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_a_search_over_all_trained_frames():
    rng = np.random.default_rng(0)
    for _ in range(20):
        train = sorted(rng.choice(40, 7, replace=False).tolist())
        wanted = list(range(40))
        nearest, blend = nearest_neighbours(wanted, train), blend_neighbours(wanted, train)
        for i in wanted:
            assert nearest.indices[i, 0] == min(train, key=lambda f: (abs(f - i), f))
            before, after = [f for f in train if f <= i], [f for f in train if f >= i]
            if before and after and before[-1] != after[0]:
                assert blend.indices[i].tolist() == [before[-1], after[0]]
                assert blend.weights[i] @ blend.indices[i] == pytest.approx(i, abs=1e-4)
            else:
                alone = before[-1] if before else after[0]
                assert blend.indices[i].tolist() == [alone, alone]
        assert (nearest.weights == 1).all()
        np.testing.assert_allclose(blend.weights.sum(1), 1, atol=1e-6)


def test_blended_frames_are_the_weighted_sum():
    frames = torch.randint(0, 256, (6, 4, 5, 3), dtype=torch.uint8)
    found = blend_frames(frames, blend_neighbours([1, 5], [0, 4]))
    expected = (0.75 * frames[0].double() + 0.25 * frames[4].double()) / 255
    torch.testing.assert_close(found[0].permute(1, 2, 0), expected.float())
    torch.testing.assert_close(found[1].permute(1, 2, 0), frames[4].float() / 255)


def test_neighbours_need_a_trained_frame():
    with pytest.raises(ValueError, match="no trained frame"):
        blend_neighbours([1], [])
    assert blend_neighbours([], [1]).indices.shape == (0, 2)
    assert nearest_neighbours([], [1]).indices.shape == (0, 1)


@pytest.mark.data
def test_baselines_of_big_buck_bunny():
    path = Path(os.environ.get("LIT_DATA", "")) / "bunny" / "bigbuckbunny.mp4"
    if "LIT_DATA" not in os.environ or not path.is_file():
        pytest.skip("LIT_DATA names no folder with bunny/bigbuckbunny.mp4")
    frames, facts = read_video(path)
    frames = torch.from_numpy(plan_geometry(facts.size, crop=(640, 1280), grid=(2, 4)).place(frames))
    roles = split_frames(len(frames), "6_6_10")

    def psnr(neighbours):
        found = []
        for i, frame in enumerate(roles.val):
            one = type(neighbours)(neighbours.indices[i : i + 1], neighbours.weights[i : i + 1])
            error = blend_frames(frames, one)[0] - frames[frame].permute(2, 0, 1) / 255
            found.append(-10 * torch.log10(error.square().mean() + 1e-9).item())
        return float(np.mean(found))

    assert psnr(nearest_neighbours(roles.val, roles.train)) == pytest.approx(28.87, abs=0.01)
    assert psnr(blend_neighbours(roles.val, roles.train)) == pytest.approx(30.34, abs=0.01)
