"""The decoder of coordinates against loops, torchvision's block and plain layers with the same weights."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlock

from lit_cli.errors import InputError
from lit_patchnerf.models import CoordinateConfig, CoordinateDecoder
from lit_patchnerf.models.blocks import ClipHead, ConvNeXtBlock, FiLM, ResidualBlock, RgbHead, pixel_shuffle
from lit_patchnerf.models.coordinate import solve_strides
from lit_patchnerf.models.encoding import PositionalEncoding

TINY = CoordinateConfig(fc_dim=8, patch=(20, 20), stem=(2, 4), floor=8, levels=6, hidden=12, clip_dim=5)
COORDINATES = torch.tensor([[0.0, 0.25, 0.125], [0.5, 0.75, 0.875], [1.0, 0.25, 0.625]])


def tiny(**changes):
    torch.manual_seed(0)
    return CoordinateDecoder(CoordinateConfig(**{**vars(TINY), **changes}))


def test_encoding_equals_a_loop():
    encoded = PositionalEncoding(1.25, 20)(COORDINATES)
    for n, point in enumerate(COORDINATES.tolist()):
        slow = []
        for x in point:
            slow += [math.sin(x * 1.25**k * math.pi) for k in range(20)]
            slow += [math.cos(x * 1.25**k * math.pi) for k in range(20)]
        torch.testing.assert_close(encoded[n], torch.tensor(slow), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("base", "levels"), [(0.0, 4), (1.25, 0)])
def test_encoding_refuses(base, levels):
    with pytest.raises(ValueError, match="at least one level and a positive base"):
        PositionalEncoding(base, levels)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (3, 5), (3, 1), (1, 2)])
def test_pixel_shuffle_equals_a_loop(rows, columns, memory_format):
    x = torch.randn(2, 4 * rows * columns, 3, 5).contiguous(memory_format=memory_format)
    slow = torch.empty(2, 4, 3 * rows, 5 * columns)
    for channel in range(x.shape[1]):
        c, place = divmod(channel, rows * columns)
        slow[:, c, place // columns :: rows, place % columns :: columns] = x[:, channel]
    y = pixel_shuffle(x, rows, columns)
    assert torch.equal(y, slow)
    assert y.is_contiguous(memory_format=memory_format)
    if rows == columns:
        assert torch.equal(y, F.pixel_shuffle(x, rows))


def test_convnext_block_equals_torchvision():
    torch.manual_seed(0)
    ours, theirs = ConvNeXtBlock(6), CNBlock(6, layer_scale=0.1, stochastic_depth_prob=0.0)
    for parameter, source in zip(ours.parameters(), (ours.scale, *list(theirs.parameters())[1:]), strict=True):
        assert parameter.shape == source.shape
        parameter.data.copy_(source.data)
    x = torch.randn(2, 6, 9, 11)
    torch.testing.assert_close(ours(x), theirs(x))


def test_modulation_and_residual_begin_with_nothing():
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(ResidualBlock(4)(x), x)
    assert torch.equal(FiLM(3, 4)(x, torch.randn(2, 3)), x)


@pytest.mark.parametrize(
    ("patch", "stem", "strides"),
    [
        ((320, 320), (9, 16), ((3, 5), (3, 1), (2, 2), (2, 2))),
        ((1080, 1920), (9, 16), ((5, 5), (3, 3), (2, 2), (2, 2), (2, 2))),
        ((20, 20), (5, 5), ((2, 2), (2, 2))),
        ((20, 20), (20, 5), ((1, 2), (1, 2))),
        ((45, 32), (9, 16), ((5, 2),)),
        ((8, 70), (2, 10), ((2, 2), (1, 2), (2, 2))),  # 70 wants 7 = no product: 8
    ],
)
def test_strides(patch, stem, strides):
    solved = solve_strides(patch, stem)
    if patch == (8, 70):
        assert sorted(solved) == sorted(strides)
    else:
        assert solved == strides
    assert all(s * math.prod(axis) >= p for s, p, axis in zip(stem, patch, zip(*solved, strict=True), strict=True))


def test_stem_must_be_smaller():
    with pytest.raises(InputError, match=r"^model\.decoder\.stem"):
        solve_strides((9, 16), (9, 16))


def test_guide_geometry_and_cost():
    config = CoordinateConfig(fc_dim=192)
    with torch.device("meta"):
        decoder, x = CoordinateDecoder(config), torch.empty(1, 3)
    assert config.decoded == (324, 320)
    assert decoder.first == (2, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rgb, clip = decoder(x)
    assert rgb.shape == (1, 3, 320, 320)
    assert clip.shape == (1, 512)
    assert counter.get_total_flops() / 2e9 == pytest.approx(15.3, abs=0.1)
    with FlopCounterMode(display=False) as search, torch.no_grad():
        decoder.embed(x)
    assert 0.18 < search.get_total_flops() / counter.get_total_flops() < 0.24


def test_forward_equals_plain_layers():
    decoder = tiny(strides=((5, 1), (2, 5)))  # 20 x 20 exactly
    encoded = decoder.encoding(COORDINATES)
    x = F.gelu(F.linear(encoded, decoder.hidden.weight, decoder.hidden.bias))
    x = F.gelu(F.linear(x, decoder.stem.weight, decoder.stem.bias)).reshape(3, 2, 4, 8).permute(0, 3, 1, 2)
    for (rows, columns), stage in zip(((5, 1), (2, 5)), decoder.stages, strict=True):
        x = F.conv2d(x, stage.conv.weight, stage.conv.bias, padding=stage.conv.weight.shape[-1] // 2)
        n, c, h, w = x.shape
        x = x.reshape(n, c // rows // columns, rows, columns, h, w).permute(0, 1, 4, 2, 5, 3)
        x = F.gelu(x.reshape(n, -1, h * rows, w * columns))
        for block in stage.blocks:
            x = block(x)
    rgb, clip = decoder(COORDINATES)
    wanted = 0.5 * torch.tanh(F.conv2d(x, decoder.rgb.conv.weight, decoder.rgb.conv.bias, padding=1)) + 0.5
    torch.testing.assert_close(rgb, wanted)
    head = nn.Sequential(decoder.clip.hidden, nn.GELU(), decoder.clip.output)
    torch.testing.assert_close(clip, F.normalize(head(x.mean((2, 3))), dim=1))
    torch.testing.assert_close(decoder.embed(COORDINATES), clip)


def test_spare_rows_are_cropped_on_both_sides():
    decoder = tiny(patch=(21, 20), stem=(9, 5), strides=((3, 2), (1, 2)))
    whole = tiny(patch=(27, 20), stem=(9, 5), strides=((3, 2), (1, 2)))
    assert torch.equal(decoder(COORDINATES).rgb, whole(COORDINATES).rgb[:, :, 3:24])


@pytest.mark.parametrize("pool", ["mean", "attention"])
@pytest.mark.parametrize("stop", [False, True])
def test_gradient_of_the_embedding(pool, stop):
    decoder = tiny(clip_pool=pool, clip_stop_gradient=stop)
    decoder(COORDINATES).clip[:, 0].sum().backward()
    trunk = [p.grad for name, p in decoder.named_parameters() if name.startswith("stages.0")]
    assert all((g is None) == stop for g in trunk)
    assert all(p.grad is not None for p in decoder.clip.parameters())
    assert all(p.grad is None for p in decoder.rgb.parameters())


def test_attention_pool_begins_as_the_mean_and_equals_a_loop():
    torch.manual_seed(0)
    head = ClipHead(4, 3, pool="attention")
    x = torch.randn(2, 4, 3, 2)
    mean = ClipHead(4, 3)
    mean.load_state_dict({k: v for k, v in head.state_dict().items() if k != "query"})
    torch.testing.assert_close(head(x), mean(x))
    head.query.data.normal_()
    pooled = []
    for sample in x.flatten(2):
        weights = [math.exp(float(sample[:, i] @ head.query.detach()) / 2) for i in range(6)]
        pooled.append(sum(w * sample[:, i] for i, w in enumerate(weights)) / sum(weights))
    torch.testing.assert_close(head(x), mean(torch.stack(pooled)[:, :, None, None]))


def test_no_head_no_embedding():
    decoder = tiny(clip_dim=None)
    assert decoder(COORDINATES).clip is None
    with pytest.raises(RuntimeError, match="clip_dim None"):
        decoder.embed(COORDINATES)


@pytest.mark.parametrize("changes", [{}, {"block": "residual", "activation": "sin", "blocks": (1,)}])
def test_seed_decides_and_every_parameter_learns(changes):
    first, second = tiny(**changes), tiny(**changes)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    rgb, clip = first(COORDINATES)
    (rgb.square().sum() + clip[:, 0].sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in first.parameters())


def test_heads_are_fp32_under_autocast_and_maps_are_not():
    decoder = tiny()
    kinds = []
    decoder.stages[-1].register_forward_hook(lambda m, i, o: kinds.append(o[0].dtype))
    decoder.stages[0].register_forward_hook(lambda m, i, o: kinds.append(o[0].dtype))
    exact = decoder(COORDINATES)
    kinds.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rgb, clip = decoder(COORDINATES)
    assert kinds == [torch.bfloat16] * 2
    assert rgb.dtype == clip.dtype == torch.float32
    assert (rgb - exact.rgb).abs().max() < 0.02


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_colours_under_autocast_are_exact_enough(scale):
    """Noise of bfloat16 below 60 dB, far from what a video is decoded to, at the ends of the range too."""
    torch.manual_seed(0)
    head = RgbHead(32)
    with torch.no_grad():
        head.conv.weight.mul_(scale)
    features = torch.randn(1, 32, 40, 40).sin().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = head(features)
    # The weights are rounded as well; that is no noise, as training sees the same.
    weight, bias = (p.detach().bfloat16().double() for p in (head.conv.weight, head.conv.bias))
    exact = 0.5 * torch.nn.functional.conv2d(features.double(), weight, bias, padding=1).tanh() + 0.5
    assert found.dtype == torch.float32
    assert -10 * (found - exact).square().mean().log10() > 60
    assert (found - exact).abs().max() < 0.5 / 255


def test_maps_are_channels_last():
    decoder = tiny().to(memory_format=torch.channels_last)
    layouts = []
    for stage in decoder.stages:
        stage.register_forward_hook(
            lambda m, i, o: layouts.append(o[0].is_contiguous(memory_format=torch.channels_last))
        )
    torch.testing.assert_close(decoder(COORDINATES).rgb, tiny()(COORDINATES).rgb)
    assert layouts == [True] * len(decoder.stages)


def test_compiles_without_graph_breaks():
    decoder = tiny()
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)  # a break would be an error
    torch.testing.assert_close(compiled(COORDINATES).rgb, decoder(COORDINATES).rgb)


def test_it_learns_a_patch():
    decoder = tiny(clip_dim=None)
    rows = torch.linspace(0, 1, 20)
    target = torch.stack([rows[:, None] * rows, rows[:, None].expand(20, 20), rows.expand(20, 20)])[None]
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(150):
        loss = F.mse_loss(decoder(COORDINATES[:1]).rgb, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3
