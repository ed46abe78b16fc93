"""The networks against published counts, against torch's own layers, and against a slow loop."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_dsunet.models import MKDC, build_network
from lit_dsunet.models.smp2d import SliceNet, slices_to_channels

TINY = {"in_channels": 1, "num_classes": 3, "strides": [1, 2, 2], "features": [4, 8, 12]}


def counts(side, **options):
    with torch.device("meta"):
        net = build_network(in_channels=1, num_classes=2, **options)
        image = torch.empty(1, 1, side, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    return sum(p.numel() for p in net.parameters()) / 1e6, counter.get_total_flops() / 1e9


# Forward GFLOP (two per multiply-add) of dynamic-network-architectures' PlainConvUNet and ResidualEncoderUNet, and of
# the guide's network, at 1 channel in and 2 classes out.
@pytest.mark.parametrize(
    ("options", "side", "params", "gflop"),
    [
        ({"arch": "unet"}, 96, 31.20, 402.66),
        ({"arch": "unet", "deep_supervision": 4}, 96, 31.20, 402.70),
        ({"arch": "unet", "deep_supervision": 4}, 128, 31.20, 954.55),
        ({"arch": "resenc"}, 96, 102.35, 605.31),
        ({"arch": "resenc", "deep_supervision": 4}, 128, 102.35, 1434.90),
        ({"arch": "r3d18_unet"}, 96, 41.9, 117.27),
        ({"arch": "r3d18_unet", "mkdc": "skips"}, 96, 41.95, 119.79),
        ({"arch": "r3d18_unet", "mkdc": "skips"}, 128, 41.95, 283.94),
    ],
)
def test_parameters_and_operations_are_the_published_ones(options, side, params, gflop):
    found = counts(side, **options)
    assert found == (pytest.approx(params, abs=0.05 if params == 41.9 else 0.006), pytest.approx(gflop, abs=0.006))


ARMS = [{"mkdc": mkdc, "deep_supervision": heads} for mkdc in ("off", "skips", "decoder") for heads in (0, 1)]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("arch", ["unet", "resenc"])
@pytest.mark.parametrize("dims", [2, 3])
def test_sizes_of_logits(arm, arch, dims):
    net = build_network(arch=arch, dims=dims, **TINY, **arm)
    image = torch.randn(2, 1, *[8] * dims)
    out = net.train()(image)
    if arm["deep_supervision"]:
        assert [tuple(o.shape[2:]) for o in out] == [(8,) * dims, (4,) * dims]
        assert [s[0] for s in net.head_strides] == [1, 2]
    else:
        assert out.shape == (2, 3, *[8] * dims)
    assert net.eval()(image).shape == (2, 3, *[8] * dims)


def test_anisotropic_strides_and_kernels():
    net = build_network(
        in_channels=2,
        num_classes=2,
        strides=[1, [1, 2, 2], [2, 2, 2]],
        kernels=[[1, 3, 3], [3, 3, 3], 3],
        features=[4, 8, 8],
        deep_supervision=1,
    )
    assert net.stride == (2, 4, 4)
    assert net.head_strides == [(1, 1, 1), (1, 2, 2)]
    finest, coarser = net.train()(torch.randn(1, 2, 4, 8, 12))
    assert finest.shape[2:] == (4, 8, 12)
    assert coarser.shape[2:] == (4, 4, 6)


def test_a_checkpoint_loads_whatever_the_number_of_heads():
    one, other = build_network(**TINY, deep_supervision=1), build_network(**TINY)
    other.load_state_dict(one.state_dict())
    image = torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(one.train()(image)[0], other.train()(image))


def test_every_trainable_parameter_gets_a_gradient():
    """Otherwise DistributedDataParallel would wait for it."""
    for heads in (0, 1):
        net = build_network(**TINY, deep_supervision=heads, mkdc="skips").train()
        out = net(torch.randn(2, 1, 8, 8, 8))
        sum(o.square().mean() for o in (out if heads else [out])).backward()
        assert [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("arch", ["unet", "resenc", "r3d18_unet"])
def test_arms_share_their_initial_weights(arch):
    """MKDC draws its numbers after the rest of the network."""
    options = {"in_channels": 1, "num_classes": 3} if arch == "r3d18_unet" else TINY
    states = []
    for arm in ({}, {"deep_supervision": 1}, {"mkdc": "skips", "deep_supervision": 1}):
        torch.manual_seed(0)
        states.append(build_network(arch=arch, **options, **arm).state_dict())
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    plain = build_network(**TINY, deep_supervision=1)
    saving = build_network(**TINY, deep_supervision=1, gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(1, 1, 8, 8, 8)
    grads = []
    for net in (plain, saving):
        sum(o.square().mean() for o in net.train()(image)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads)


def slow_mkdc(module, x):
    """Branch by branch, channel by channel."""
    total = torch.zeros_like(x)
    for kernel, conv, norm in zip(module.kernels, module.convs, module.norms, strict=True):
        out = torch.empty_like(x)
        for c in range(x.shape[1]):
            weight = conv.weight[c : c + 1]
            function = nn.functional.conv3d if x.ndim == 5 else nn.functional.conv2d
            out[:, c : c + 1] = function(x[:, c : c + 1], weight, padding=kernel // 2)
        total += norm(out).clamp(0, 6)
    g = module.groups
    order = [i * (x.shape[1] // g) + j for j in range(x.shape[1] // g) for i in range(g)]
    return total[:, order] + (x if module.residual else 0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_mkdc_against_a_loop(dims, norm, residual, fused):
    torch.manual_seed(0)
    module = MKDC(6, dims=dims, norm=norm, residual=residual, fused=fused).train()
    x = torch.randn(2, 6, *[7] * dims)
    expected = slow_mkdc(copy.deepcopy(module), x)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(64, 2), (96, 3), (256, 2), (5, 1)])
def test_mkdc_shuffles_in_as_many_groups_as_divide_the_channels(channels, groups):
    assert MKDC(channels).groups == groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": [1, 2]}, "3 features need as many strides"),
        ({"deep_supervision": 2}, r"model\.deep_supervision: expected 0 to 1, got 2"),
        ({"strides": [1, [2, 2], 2]}, "expected 3 positive numbers"),
        ({"mkdc": "skips", "mkdc_kernels": [2]}, r"mkdc\.kernels: expected odd"),
        ({"arch": "smp"}, r"model\.arch smp: expected dims 2"),
        ({"arch": "r3d18_unet", "mkdc": "decoder"}, r"model\.arch r3d18_unet"),
        ({"pretrained": True}, r"model\.pretrained: only arch smp"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_network(**{**TINY, **options})


@pytest.mark.parametrize("decoder", ["Unet", "FPN"])
def test_slice_networks_have_heads_on_their_decoder(decoder):
    torch.manual_seed(0)
    net = SliceNet(in_channels=3, num_classes=2, encoder="tu-resnet10t", decoder=decoder, deep_supervision=2)
    image = torch.randn(2, 3, 64, 64)
    out = net.train()(image)
    assert [64 // o.shape[-1] for o in out] == [s[0] for s in net.head_strides[:3]]
    assert net.eval()(image).shape == (2, 2, 64, 64)
    for module in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(module.eval()(image), net(image))
        assert len(module.train()(image)) == 3
    sum(o.mean() for o in out).backward()
    unused = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in unused if n.startswith("heads")]


def test_neighbouring_slices_become_channels():
    volume = torch.arange(2 * 1 * 4 * 1 * 1).reshape(2, 1, 4, 1, 1).float()
    out = slices_to_channels(volume, 3)
    assert out.shape == (8, 3, 1, 1)
    assert out[0].flatten().tolist() == [0, 0, 1]
    assert out[5].flatten().tolist() == [4, 5, 6]
    assert out[7].flatten().tolist() == [6, 7, 7]
