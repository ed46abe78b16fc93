"""Shapes, gradients and weights of the network, over backbones of each family."""

import copy

import pytest
import timm
import torch
from torch import nn

from lit_cli.errors import InputError
from lit_landmarks.model import (
    HeatmapNet,
    checkpoint_blocks,
    compile_blocks,
    create_timm,
    load_weights,
    outermost_blocks,
)

FAMILIES = [
    pytest.param("hrnet_w18_small", "auto", id="hrnet, branch"),
    pytest.param("resnet10t", "auto", id="resnet10t, pyramid"),
    pytest.param("test_convnext", "pyramid", id="convnext, pyramid"),
    pytest.param("hrnet_w18_small", "pyramid", id="hrnet, pyramid"),
    pytest.param("resnet10t", "Unet", id="timm resnet10t, Unet"),
    pytest.param("resnet18", "unet", id="smp resnet18, Unet"),
    pytest.param("resnet18", "FPN", id="smp resnet18, FPN"),
]
QUICK = [p for p in FAMILIES if not p.values[0].startswith("hrnet")]


def net(backbone="resnet10t", decoder="auto", **kwargs):
    torch.manual_seed(0)
    return HeatmapNet(backbone=backbone, decoder=decoder, **{"num_landmarks": 5, **kwargs})


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize(("backbone", "decoder"), FAMILIES)
def test_shapes_and_gradients(backbone, decoder, stride):
    model = net(backbone, decoder, stride=stride)
    # Not square, so that height and width cannot be exchanged.
    out = model(torch.rand(2, 1, 64, 96))
    assert out.shape == (2, 5, 64 // stride, 96 // stride)
    out.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert not idle
    assert [name for name, p in model.named_parameters() if not torch.isfinite(p.grad).all()] == []


def test_colour_images():
    assert net(in_channels=3)(torch.rand(1, 3, 64, 64)).shape == (1, 5, 16, 16)


@pytest.mark.parametrize("decoder", ["UnetPlusPlus", "Linknet", "MAnet", "PAN", "DeepLabV3Plus", "PSPNet"])
def test_other_decoders_of_smp(decoder):
    model = net("resnet18", decoder).eval()
    assert model(torch.rand(1, 1, 128, 128)).shape == (1, 5, 32, 32)


def test_maps_start_near_zero():
    out = net()(torch.rand(2, 1, 64, 64))
    assert out.abs().max() < 0.5


@pytest.mark.parametrize("stride", [2, 4])
def test_a_truncated_unet_is_smaller(stride):
    full, cut = (sum(p.numel() for p in net("resnet18", "Unet", stride=s).parameters()) for s in (1, stride))
    assert cut < full


def test_guide_name_means_w32():
    a, b = (HeatmapNet(backbone=name, num_landmarks=2).body for name in ("hrnet", "hrnet_w32"))
    assert [(k, v.shape) for k, v in a.state_dict().items()] == [(k, v.shape) for k, v in b.state_dict().items()]
    assert a.channels == 32


# ---- gradient checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "decoder"), [("resnet10t", "auto"), ("hrnet_w18_small", "auto"), ("resnet18", "Unet")]
)
def test_gradient_checkpointing_changes_no_figure(backbone, decoder):
    plain = net(backbone, decoder)
    saving = copy.deepcopy(plain)
    checkpoint_blocks(saving.body)
    assert list(plain.state_dict()) == list(saving.state_dict())
    images = torch.rand(2, 1, 64, 64)
    outs = [model(images) for model in (plain, saving)]
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    for out in outs:
        out.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    with torch.no_grad():
        assert saving(images).shape == outs[0].shape


def test_gradient_checkpointing_keeps_fewer_activations():
    def kept(model):
        sizes = []

        def pack(t):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.rand(2, 1, 64, 64))
        return sum(sizes)

    assert kept(net("resnet18", "FPN", gradient_checkpointing=True)) < 0.8 * kept(net("resnet18", "FPN"))


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stride": 3}, r"model\.stride: expected 1, 2 or 4, got 3"),
        ({"backbone": "resnet10x"}, "timm has no model 'resnet10x'; near it: "),
        ({"backbone": "zzz"}, "timm has no model 'zzz'"),
        ({"backbone": "resnet10x", "decoder": "Unet"}, r"model\.backbone: neither timm nor .* has 'resnet10x'"),
        ({"decoder": "Unet9"}, r"model\.decoder: unknown 'Unet9'; expected auto, branch, pyramid or one of .*Unet"),
        ({"decoder": "branch"}, r"model\.decoder: 'branch' needs an hrnet backbone, got resnet10t"),
        ({"backbone": "test_vit", "decoder": "Unet"}, r"model\.(backbone|decoder)"),
        ({"backbone": "resnet18", "decoder": "DPT"}, r"model\.(backbone|decoder)"),
    ],
)
def test_names_that_do_not_exist(kwargs, message):
    with pytest.raises(InputError, match=message) as error:
        net(**kwargs)
    assert "\n" not in str(error.value)


# ---- weights --------------------------------------------------------------------------------------------------------


def saved(model, path):
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("backbone", ["resnet10t", "hrnet_w18_small"])
def test_a_file_of_timm_weights_is_loaded(tmp_path, backbone):
    torch.manual_seed(1)
    donor = timm.create_model(backbone, in_chans=1)
    model = net(backbone, pretrained=saved(donor, tmp_path / "w.pth"))
    theirs = donor.state_dict()
    for name, value in model.body.net.state_dict().items():
        torch.testing.assert_close(value, theirs[name], msg=name)


def test_a_file_of_safetensors_is_loaded(tmp_path):
    from safetensors.torch import save_file

    donor = timm.create_model("resnet10t", in_chans=1)
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    model = net(pretrained=str(tmp_path / "w.safetensors"))
    torch.testing.assert_close(model.body.net.layer1[0].conv1.weight, donor.layer1[0].conv1.weight)


@pytest.mark.parametrize("backbone", ["test_convnext", "test_efficientnet", "test_resnet"])
def test_names_that_timm_flattens_are_found(tmp_path, backbone):
    """`features_only` renames `stages.0` to `stages_0`; the file that timm offers for download has the first."""
    torch.manual_seed(1)
    donor = timm.create_model(backbone, in_chans=1)
    model = net(backbone, "pyramid", pretrained=saved(donor, tmp_path / "w.pth"))
    own = model.body.net.state_dict()
    convolutions = {n for n, v in own.items() if v.ndim == 4}
    values = {v.sum().item() for v in donor.state_dict().values()}
    assert {n for n in convolutions if own[n].sum().item() not in values} == set()


@pytest.mark.parametrize(
    ("backbone", "decoder"), [("resnet10t", "pyramid"), ("resnet10t", "Unet"), ("resnet18", "Unet")]
)
def test_weights_of_colour_images_serve_grey_ones(tmp_path, backbone, decoder):
    """Every published file has three input channels: the first convolution must not stay random for that."""
    torch.manual_seed(1)
    donor = timm.create_model(backbone)
    first = next(p for p in donor.parameters() if p.ndim == 4)
    model = net(backbone, decoder, in_channels=1, pretrained=saved(donor, tmp_path / "w.pth"))
    grey = next(p for p in model.body.parameters() if p.ndim == 4)
    torch.testing.assert_close(grey, first.sum(1, keepdim=True))  # timm's own rule
    assert any(torch.equal(p, donor.layer1[0].conv1.weight) for p in model.body.parameters() if p.ndim == 4)


def test_a_wrong_file_is_refused(tmp_path):
    other = saved(timm.create_model("test_convnext"), tmp_path / "other.pth")
    text, tensor = tmp_path / "text.pth", tmp_path / "tensor.pth"
    text.write_text("no weights")
    torch.save(torch.zeros(3), tensor)
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    for path, message in (
        (other, r"holds \d+ of the \d+ tensors of this backbone"),
        (text, "is not a weights file"),
        (tensor, "not a weights file"),
        (tmp_path / "none.pth", "holds 0 of"),
        (tmp_path / "nowhere.pth", "no file"),
    ):
        with pytest.raises(InputError, match=message) as error:
            net(pretrained=str(path))
        assert str(error.value).startswith("model.pretrained")
        assert "\n" not in str(error.value)


def test_load_weights_takes_a_state_dict_inside_a_checkpoint(tmp_path):
    donor, model = create_timm("resnet10t", 1, False), create_timm("resnet10t", 1, False)
    torch.save({"state_dict": donor.state_dict(), "epoch": 4}, tmp_path / "c.ckpt")
    load_weights(model, str(tmp_path / "c.ckpt"))
    for a, b in zip(model.parameters(), donor.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("decoder", ["pyramid", "Unet"])
@pytest.mark.parametrize(
    "error", [OSError("no connection\nand more"), ConnectionError("refused"), RuntimeError("No pretrained weights")]
)
def test_a_failed_download_gives_the_way_out(monkeypatch, decoder, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(InputError, match=r"model\.pretrained: .*--model\.pretrained PATH") as found:
        net(decoder=decoder, pretrained=True)
    assert "--model.pretrained false" in str(found.value)
    assert "\n" not in str(found.value)


def test_offline_download_gives_the_way_out(monkeypatch, tmp_path):
    """As in a process started with HF_HUB_OFFLINE=1 and an empty cache."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"model\.pretrained: no weights for resnet10t .*--model\.pretrained PATH"):
        net(pretrained=True)


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_every_residual_block_is_compiled_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: compiled.append((self, kwargs)))
    assert compile_blocks(net("resnet10t"), dynamic=False) == 4
    assert len({id(m) for m, _ in compiled}) == 4
    assert all(k == {"dynamic": False} for _, k in compiled)
    compiled.clear()
    model = net("hrnet_w18_small")
    blocks = [m for m in model.modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
    assert compile_blocks(model) == len(blocks) > 10
    assert {id(m) for m, _ in compiled} == {id(m) for m in blocks}


def test_outermost_blocks_do_not_lie_inside_each_other():
    found = list(outermost_blocks(net("hrnet_w18_small").body))
    inside = {id(m) for block in found for m in block.modules() if m is not block}
    assert found
    assert not inside & {id(block) for block in found}
