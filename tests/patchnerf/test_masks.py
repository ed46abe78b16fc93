import cv2
import numpy as np
import pytest
import torch

from lit_patchnerf.masks import inpaint_squares, load_mask
from lit_patchnerf.patches import plan_geometry
from tests.helpers.errors import refused

PADDED = plan_geometry((30, 44), crop=(26, 40), patch=(8, 12))  # 26x40 from row 2 and column 2 on, in 32x48


def write(path, white: np.ndarray):
    cv2.imwrite(str(path), white.astype(np.uint8) * 255)
    return str(path)


@pytest.mark.parametrize(("size", "canvas"), [(50, (640, 1280)), (5, (32, 48)), (1, (9, 7)), (16, (32, 50))])
def test_five_squares_around_the_centres_of_the_image_and_its_quarters(size, canvas):
    height, width = canvas
    expected = np.zeros(canvas, bool)
    for row, column in ((2, 2), (1, 1), (1, 3), (3, 1), (3, 3)):
        for y in range(size):
            for x in range(size):
                expected[row * height // 4 - size // 2 + y, column * width // 4 - size // 2 + x] = True
    found = inpaint_squares(size, canvas)
    np.testing.assert_array_equal(found, expected)
    if size == 50:
        assert found.sum() == 5 * 50 * 50  # none overlap at HNeRV's size


def test_squares_lie_on_the_canvas_and_leave_the_padding_alone():
    hidden = load_mask("inpaint_15", PADDED)
    assert hidden.shape == (1, 1, 32, 48)
    assert hidden.dtype == torch.bool
    expected = inpaint_squares(15, (32, 48))
    assert expected[1].any()  # in the padding
    expected[:3] = expected[29:] = expected[:, :4] = expected[:, 44:] = False
    np.testing.assert_array_equal(hidden[0, 0].numpy(), expected)


def test_an_image_in_the_size_of_the_frame_is_cropped_and_padded_as_frames_are(tmp_path):
    white = np.random.default_rng(0).random((30, 44)) < 0.3
    hidden = load_mask(write(tmp_path / "m.png", white), PADDED)[0, 0].numpy()
    np.testing.assert_array_equal(hidden[3:29, 4:44], white[2:28, 2:42])
    assert hidden.sum() == white[2:28, 2:42].sum()


def test_an_image_in_the_size_of_the_canvas_is_taken_as_it_is(tmp_path):
    white = np.random.default_rng(0).random((32, 48)) < 0.3
    hidden = load_mask(write(tmp_path / "m.png", white), PADDED)[0, 0].numpy()
    np.testing.assert_array_equal(hidden[PADDED.content], white[PADDED.content])
    assert hidden.sum() == white[PADDED.content].sum()


def test_colours_and_grey_values_are_hidden_from_128_up(tmp_path):
    grey = np.tile(np.linspace(0, 255, 44).astype(np.uint8), (30, 1))
    cv2.imwrite(str(tmp_path / "m.png"), np.repeat(grey[..., None], 3, 2))
    hidden = load_mask(str(tmp_path / "m.png"), plan_geometry((30, 44)))
    np.testing.assert_array_equal(hidden[0, 0].numpy(), grey >= 128)


def test_bad_masks_are_one_line(tmp_path):
    def check(mask, *parts):
        refused(lambda: load_mask(str(mask), PADDED), "data.mask", *parts)

    check("inpaint_17", "inpaint_17", "canvas of 32x48", "about 16")
    check("inpaint_0", "1 pixel or more")
    check("inpaint_x", "no such file", "inpaint_N")
    check(tmp_path / "none.png", "no such file")
    (tmp_path / "text.png").write_text("no image")
    check(tmp_path / "text.png", "cannot be read")
    (tmp_path / "empty.png").touch()
    check(tmp_path / "empty.png", "cannot be read")
    check(write(tmp_path / "small.png", np.ones((20, 44), bool)), "20x44", "30x44", "32x48")
    check(write(tmp_path / "black.png", np.zeros((30, 44), bool)), "hides none", "1040 pixels")
    check(write(tmp_path / "white.png", np.ones((32, 48), bool)), "hides all")
    # Only what the crop left counts.
    border = np.ones((30, 44), bool)
    border[2:28, 2:42] = False
    check(write(tmp_path / "border.png", border), "hides none")
    refused(lambda: load_mask("inpaint_16", plan_geometry((32, 32), crop=(32, 32))), "hides all")
