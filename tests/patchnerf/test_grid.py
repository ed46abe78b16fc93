"""The decoder of latents against plain layers, a loop over time, and its patches against crops of its frames."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lit_cli.errors import InputError
from lit_patchnerf.models import GridConfig, GridDecoder
from lit_patchnerf.models.grid import TemporalGrid, patch_strides

TINY = GridConfig(
    width=10,
    frame=(40, 80),
    grid=(2, 4),
    strides=((5, 5), (2, 2), (2, 2)),
    floor=6,
    latent_frames=(7, 3),
    latent_channels=(4, 3),
    levels=4,
)
T = torch.tensor([0.0, 0.3, 1.0])


def tiny(**changes):
    """Every parameter random: FiLM and residual blocks begin with zeros."""
    torch.manual_seed(0)
    decoder = GridDecoder(GridConfig(**{**vars(TINY), **changes}))
    for parameter in decoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return decoder.eval()


def crop(frames, config, row, column):
    height, width = config.patch
    return frames[..., row * height : (row + 1) * height, column * width : (column + 1) * width]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"levels": 0, "kernels": (3,)},
        {"activation": "sin", "blocks": (1,), "block": "residual"},
        {"blocks": (1, 0, 2), "kernels": (5, 3)},
        {"kernels": (7, 9), "clip_dim": 5, "clip_stage": 1},
        {"clip_dim": 5, "clip_stage": 3, "blocks": (0, 1)},
        {"frame": (48, 80), "grid": (1, 2), "strides": ((4, 5), (3, 2), (2, 4)), "clip_dim": 5, "blocks": (1,)},
        {"strides": ((2, 2), (2, 2)), "kernels": (5,), "clip_dim": 5},  # 5 x 5 latent cells a patch
        {"grid": (1, 1), "strides": ((5, 5), (2, 2))},
        {"atlas_stages": (2,), "clip_dim": 5},
        {
            "atlas_stages": (3, 1),
            "atlas_channels": (1, 3),
            "atlas_scales": (0.5, 1.0),
            "blocks": (1,),
            "clip_dim": 5,
            "clip_stage": 1,
        },
        {"atlas_stages": (3,), "camera_frames": 0, "atlas_margin": 0.0},
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patch_is_the_crop_of_its_frame(changes, memory_format):
    decoder = tiny(**changes).to(memory_format=memory_format)
    config = decoder.config
    with torch.no_grad():
        frames = decoder(T)
        for row in range(config.grid[0]):
            for column in range(config.grid[1]):
                patch = decoder.forward_patch(T, row, column)
                assert (patch.rgb - crop(frames.rgb, config, row, column)).abs().max() < 1e-5
                if config.clip_dim:
                    assert (patch.clip - frames.clip[:, row, column]).abs().max() < 1e-5
    assert frames.rgb.std() > 0.01


def test_a_batch_of_different_patches():
    decoder = tiny(blocks=(1,))
    rows, columns = torch.tensor([1, 0, 1]), torch.tensor([3, 2, 0])
    with torch.no_grad():
        frames, patches = decoder(T).rgb, decoder.forward_patch(T, rows, columns).rgb
    for n in range(3):
        wanted = crop(frames[n], decoder.config, int(rows[n]), int(columns[n]))
        assert (patches[n] - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("changes", [{}, {"atlas_stages": (2,), "camera_frames": 4}])
def test_gradients_of_patches_add_up_to_those_of_the_frame(changes):
    config = TINY
    whole, parts = tiny(**changes).double(), tiny(**changes).double()
    target = torch.rand(1, 3, *config.frame, dtype=torch.float64)
    t = T[1:2]
    ((whole(t).rgb - target) ** 2).sum().backward()
    for row in range(2):
        for column in range(4):
            wanted = crop(target, config, row, column)
            ((parts.forward_patch(t, row, column).rgb - wanted) ** 2).sum().backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_patch_costs_little_more_than_its_share():
    with torch.device("meta"):
        decoder, t = GridDecoder(GridConfig()), torch.empty(1)
    assert decoder.cells == (1, 1)
    assert decoder.halos == [(rows, rows) for rows in (1, 2, 3, 4, 3, 1)]  # 1 -> 1/2 + 2 -> 3/2 + 2 -> 4/4 + 2 ...
    costs = []
    for call in (lambda: decoder(t), lambda: decoder.forward_patch(t, 0, 0)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        costs.append(counter.get_total_flops())
    assert 1 < 8 * costs[1] / costs[0] < 1.2


def test_cost_is_hnervs():
    config = GridConfig(width=68, latent_frames=(132,), latent_channels=(16,), levels=0)
    with torch.device("meta"):
        decoder, t = GridDecoder(config), torch.empty(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(t)
    assert counter.get_total_flops() / 2e9 == pytest.approx(28.8, abs=0.1)


def test_a_patch_needs_no_more_than_its_halo():
    decoder = tiny(frame=(40, 160), grid=(2, 8))
    with torch.no_grad():
        before = decoder.forward_patch(T, 0, 0).rgb
        reach = decoder.halos[0][1]
        for grid in decoder.latents:
            grid.values.data[..., 1 + reach :] = 1e3
        assert torch.equal(before, decoder.forward_patch(T, 0, 0).rgb)


def test_without_film_it_is_plain_layers():
    decoder = tiny(levels=0, latent_frames=(7,), latent_channels=(4,))
    layers: list[nn.Module] = [nn.Conv2d(4, 10, 1), nn.GELU()]
    widths, kernels = [10, 8, 7, 6], [1, 3, 5]
    for i, stride in enumerate((5, 2, 2)):
        conv = nn.Conv2d(widths[i], widths[i + 1] * stride**2, kernels[i], padding=kernels[i] // 2)
        layers += [conv, nn.PixelShuffle(stride), nn.GELU()]
    plain = nn.Sequential(*layers, nn.Conv2d(6, 3, 3, padding=1), nn.Tanh())
    parameters = dict(decoder.named_parameters())
    latents = parameters.pop("latents.0.values")
    for mine, theirs in zip(parameters.values(), plain.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    frames = decoder(torch.tensor([0.5])).rgb  # the fourth of seven
    torch.testing.assert_close(frames, 0.5 * plain(latents[3:4]) + 0.5)


@pytest.mark.parametrize("points", [1, 2, 5])
def test_latents_are_linear_in_time(points):
    torch.manual_seed(0)
    grid = TemporalGrid(points, 2, (1, 3))
    t = torch.linspace(0, 1, 13)
    values = grid.values.detach().numpy().reshape(points, -1)
    slow = [np.interp(t * max(points - 1, 1), np.arange(points), values[:, i]) for i in range(6)]
    if points == 1:
        slow = [np.full(13, values[0, i]) for i in range(6)]
    expected = torch.tensor(np.stack(slow, 1), dtype=torch.float32).view(13, 2, 1, 3)
    torch.testing.assert_close(grid(t).detach(), expected)
    double = grid.values.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: torch.func.functional_call(grid, {"values": v}, t), double)


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        ((320, 320), ((5, 5), (4, 4), (4, 4), (2, 2), (2, 2))),
        ((360, 320), ((5, 5), (4, 4), (3, 4), (3, 2), (2, 2))),
        ((20, 24), ((5, 3), (2, 2), (2, 2), (1, 2), (1, 1))),
    ],
)
def test_strides(patch, strides):
    assert patch_strides(patch) == strides


@pytest.mark.parametrize("patch", [(322, 320), (320, 0), (17, 20)])
def test_strides_refuse(patch):
    with pytest.raises(InputError, match=r"^model\.decoder\.strides: expected strides for patches"):
        patch_strides(patch)


def test_seed_decides_and_every_parameter_learns():
    torch.manual_seed(3)
    first = GridDecoder(GridConfig(**{**vars(TINY), "clip_dim": 4}))
    torch.manual_seed(3)
    second = GridDecoder(first.config)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    decoder = tiny(clip_dim=4)
    rgb, clip = decoder(torch.linspace(0, 1, 7))
    (rgb.square().sum() + clip[..., 0].sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_heads_are_fp32_under_autocast_and_maps_are_not():
    decoder = tiny(clip_dim=4, blocks=(1,), atlas_stages=(3,))
    exact = decoder(T)
    kinds = []
    decoder.stages[-1].register_forward_hook(lambda m, i, o: kinds.append(o[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        frames, patches = decoder(T), decoder.forward_patch(T, 0, 1)
    assert kinds == [torch.bfloat16] * 2
    for rgb, clip in (frames, patches):
        assert rgb.dtype == clip.dtype == torch.float32
    assert (frames.rgb - exact.rgb).abs().max() < 0.05
    assert (patches.rgb - crop(exact.rgb, TINY, 0, 1)).abs().max() < 0.05


def test_compiles_without_graph_breaks():
    decoder = tiny(blocks=(0, 1), clip_dim=4, atlas_stages=(2,))
    rows, columns = torch.tensor([1, 0, 1]), torch.tensor([3, 2, 0])
    assert torch._dynamo.explain(decoder)(T).graph_break_count == 0
    compiled = torch.compile(decoder.forward_patch, backend="eager", fullgraph=True)  # a break would be an error
    torch.testing.assert_close(compiled(T, rows, columns).rgb, decoder.forward_patch(T, rows, columns).rgb)


def test_it_learns_frames_from_patches():
    torch.manual_seed(0)
    decoder = GridDecoder(GridConfig(**{**vars(TINY), "latent_frames": (3, 2)}))
    y, x = torch.linspace(0, 1, 40)[:, None], torch.linspace(0, 1, 80)
    video = torch.stack(
        [torch.stack([(y - x + s).abs() / 2, y.expand(40, 80), x.expand(40, 80)]) for s in (0, 0.3, 0.6)]
    )
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    index = torch.arange(24)
    t, row, column = index // 8, index // 4 % 2, index % 4
    target = torch.stack([crop(video[n], TINY, int(r), int(c)) for n, r, c in zip(t, row, column, strict=True)])
    for _ in range(200):
        loss = F.mse_loss(decoder.forward_patch(t / 2, row, column).rgb, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert F.mse_loss(decoder(torch.tensor([0.0, 0.5, 1.0])).rgb, video) < 1e-3
