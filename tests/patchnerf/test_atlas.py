"""The atlas against torch's grid_sample, and a camera that is found by training."""

import pytest
import torch
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_patchnerf.models import GridConfig, GridDecoder
from lit_patchnerf.models.atlas import GAIN, Atlas, CameraPath
from lit_patchnerf.models.blocks import Window
from lit_patchnerf.optim import make_optimizer

SIZE = (12, 20)


def sampled(atlas, down, right, zoom):
    """The same by `grid_sample`, whose corners -1 and 1 are those of the atlas."""
    height, width = SIZE
    y = (torch.arange(height) + 0.5) / height * 2 - 1
    x = (torch.arange(width) + 0.5) / width * 2 - 1
    rows, columns = atlas.values.shape[1:]
    y = (y * torch.exp(-zoom) + down) * height * atlas.scale / rows
    x = (x * torch.exp(-zoom) + right) * width * atlas.scale / columns
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
    return F.grid_sample(GAIN * atlas.values[None], grid, padding_mode="border", align_corners=False)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(("down", "right", "zoom"), [(0, 0, 0), (0.1, -0.07, 0), (0, 0, 0.3), (-0.9, 0.8, -0.5)])
def test_against_grid_sample(down, right, zoom, scale):
    torch.manual_seed(0)
    atlas = Atlas(3, 5, SIZE, 0.3, scale)
    assert atlas.values.shape == ((3, 16, 26) if scale == 1 else (3, 8, 14))
    camera = [torch.tensor([float(v)], requires_grad=True) for v in (down, right, zoom)]
    theirs = [torch.tensor(float(v), requires_grad=True) for v in (down, right, zoom)]
    mine = atlas(tuple(camera), torch.zeros(1, 5, *SIZE))
    wanted = F.conv2d(sampled(atlas, *theirs), atlas.mix.weight[:, :, None, None])
    torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(mine)
    found = torch.autograd.grad((mine * weight).sum(), [*camera, atlas.values], retain_graph=True)
    expected = torch.autograd.grad((wanted * weight).sum(), [*theirs, atlas.values])
    if down == right == 0:  # positions lie on places, where a rounding chooses between two slopes
        found, expected = found[3:], expected[3:]
        assert all(float(g) != 0 for g in torch.autograd.grad((mine * weight).sum(), camera))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, atol=1e-3, rtol=1e-3)


def test_a_window_is_a_part_of_the_whole():
    torch.manual_seed(0)
    atlas, path = Atlas(2, 4, SIZE, margin=0.2), CameraPath(3)
    for parameter in path.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    camera = path(torch.tensor([0.2, 0.9]))
    whole = atlas(camera, torch.zeros(2, 4, *SIZE))
    window = Window(torch.tensor([3, -2]), torch.tensor([5, 12]), *SIZE)
    part = atlas(camera, torch.zeros(2, 4, 6, 8), window)
    assert torch.equal(part[0], whole[0, :, 3:9, 5:13])
    assert torch.equal(part[1, :, 2:], whole[1, :, :4, 12:])


def test_a_still_camera_sees_the_middle():
    atlas = Atlas(1, 1, SIZE, margin=0.3)
    atlas.mix.weight.data.fill_(1.0)
    still = torch.zeros(1)
    seen = atlas((still, still, still), torch.zeros(1, 1, *SIZE))[0]
    torch.testing.assert_close(seen, GAIN * atlas.values[:, 2:14, 3:23], atol=1e-5, rtol=0)


def test_the_path_of_a_camera_is_found():
    """A picture that moves: the shifts come out up to one of them all, which the picture can take up."""
    torch.manual_seed(0)
    points = 5
    shifts = torch.tensor([0.0, 0.05, 0.12, 0.16, 0.16])
    picture = F.interpolate(torch.rand(1, 3, 12, 12), (160, 160), mode="bicubic").clamp(0, 1)[0]
    frames = []
    for s in shifts:  # the view moves right over the picture
        base = F.affine_grid(torch.tensor([[[0.5, 0, float(s) / 2], [0, 0.5, 0]]]), [1, 3, 40, 40], align_corners=False)
        frames.append(F.grid_sample(picture[None], base, align_corners=False)[0])
    video = torch.stack(frames)
    config = GridConfig(
        width=8, frame=(40, 40), grid=(1, 1), strides=((5, 5), (4, 4)), multiple=1, floor=8, levels=0, activation="sin",
        latent_frames=(2,), latent_channels=(1,), atlas_stages=(2,), atlas_channels=(3,), atlas_margin=0.3,
        camera_frames=points,
    )  # fmt: skip
    decoder = GridDecoder(config)
    optimizer = make_optimizer("muon", decoder.named_parameters(), lr=5e-3, muon_scale="spectral", muon_lr=0.02)
    t = torch.linspace(0, 1, points)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / 400)
        optimizer.zero_grad()
        (decoder(t).rgb - video).square().mean().backward()
        optimizer.step()
    found = decoder.camera.right.detach()
    torch.testing.assert_close(found - found.mean(), shifts - shifts.mean(), atol=0.01, rtol=0)
    assert decoder.camera.down.detach().std() < 0.01


def test_adamw_has_atlas_and_camera():
    decoder = GridDecoder(
        GridConfig(width=8, frame=(40, 80), strides=((5, 5), (2, 2)), atlas_stages=(1,), atlas_channels=(4,))
    )
    names = {id(p): n for n, p in decoder.named_parameters()}
    muon, *rest = make_optimizer("muon", decoder.named_parameters(), lr=1e-3, weight_decay=0.1).param_groups
    assert muon["name"] == "muon"
    assert not any("atlas" in names[id(p)] or "camera" in names[id(p)] for p in muon["params"])
    undecayed = {names[id(p)] for group in rest if not group["weight_decay"] for p in group["params"]}
    assert {"atlases.1.values", "camera.down", "camera.right", "camera.zoom"} <= undecayed


@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({}, 0),
        ({"camera_frames": 9}, 0),
        ({"atlas_stages": (1,)}, 6),
        ({"atlas_stages": (1,), "latent_frames": (24,), "latent_channels": (4,)}, 24),
        ({"atlas_stages": (1,), "camera_frames": 9}, 9),
        ({"atlas_stages": (1,), "camera_frames": 0}, 0),
        ({"atlas_stages": (1,), "latent_frames": (1,), "latent_channels": (4,)}, 0),
    ],
)
def test_points_of_the_path(options, points):
    latents = {"latent_frames": (24, 6), "latent_channels": (4, 4)}
    config = GridConfig(**{"width": 8, "frame": (40, 80), "strides": ((5, 5), (2, 2)), **latents, **options})
    assert config.camera_points == points
    assert (GridDecoder(config).camera is None) == (points == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atlas_stages": (3,)}, r"atlas_stages: expected different stages from 1 to 2, got \(3,\)"),
        ({"atlas_stages": (0,)}, "atlas_stages: expected different stages from 1 to 2"),
        ({"atlas_stages": (1, 1)}, "atlas_stages: expected different stages from 1 to 2"),
        ({"atlas_channels": ()}, "atlas_channels: expected positive numbers"),
        ({"atlas_scales": (0.0,)}, r"atlas_scales: expected numbers above 0 and up to 1, got \(0.0,\)"),
        ({"atlas_scales": (2.0,)}, "atlas_scales: expected numbers above 0 and up to 1"),
        ({"atlas_margin": -0.1}, "atlas_margin: expected a share from 0 to 1, got -0.1"),
        ({"camera_frames": 1}, "camera_frames: expected 0, or 2 and more, got 1"),
    ],
)
def test_refused(options, message):
    with pytest.raises(InputError, match=message):
        GridConfig(**{"width": 8, "frame": (40, 80), "strides": ((5, 5), (2, 2)), **options})
