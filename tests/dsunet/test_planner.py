"""Plans against nnU-Net's published ones, measured memory, and the constraints that they must keep."""

import math

import numpy as np
import pytest
import torch
import yaml

from lit_cli.errors import InputError
from lit_dsunet.models import build_network
from lit_dsunet.planner import (
    activations,
    estimate_gib,
    fingerprint,
    make_plan,
    target_spacing,
    topology,
    write_plan,
)

HIPPOCAMPUS = fingerprint([[36, 50, 35]] * 260, [[1.0, 1.0, 1.0]] * 260, 1, 3)
ISLES = fingerprint([[73, 112, 112]] * 250, [[2.0, 2.0, 2.0]] * 250, 2, 2)
HEAD = fingerprint([[155, 240, 240]] * 300, [[1.0, 1.0, 1.0]] * 300, 4, 4)
THICK = fingerprint([[16, 320, 320]] * 50, [[6.0, 0.6, 0.6]] * 50, 1, 3)


def test_hippocampus_is_planned_as_nnunet_does():
    plan = make_plan(HIPPOCAMPUS, 8)
    assert plan.patch == (40, 56, 40)
    assert plan.batch_size == 9
    assert len(plan.strides) == 4


@pytest.mark.parametrize(("patch", "batch", "measured"), [((96, 96, 96), 8, 7.7), ((128, 128, 128), 2, 4.7)])
def test_memory_estimates_are_near_the_measured_peaks(patch, batch, measured):
    """Peaks of the allocator for PlainConvUNet on an H200; the estimate adds the context."""
    data = fingerprint([[155, 240, 240]], [[1.0, 1.0, 1.0]], 1, 2)
    assert estimate_gib(data, patch, (1.0, 1.0, 1.0), batch, "unet") - 0.6 == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("data", [HIPPOCAMPUS, ISLES, HEAD, THICK])
@pytest.mark.parametrize("memory", [8, 24, 80])
@pytest.mark.parametrize("arch", ["unet", "resenc"])
def test_plans_fit_their_card_and_their_network(data, memory, arch):
    plan = make_plan(data, memory, arch=arch)
    assert plan.memory_gib <= memory
    assert plan.batch_size >= 2
    total = np.prod(plan.strides, axis=0)
    assert all(p % t == 0 for p, t in zip(plan.patch, total, strict=True))
    assert all(p // t >= 4 or t == 1 for p, t in zip(plan.patch, total, strict=True))
    with torch.device("meta"):
        net = build_network(in_channels=1, num_classes=2, arch=arch, strides=plan.strides, kernels=plan.kernels)
        assert net.eval()(torch.empty(1, 1, *plan.patch)).shape[2:] == plan.patch


def test_more_memory_never_gives_less():
    for data in (ISLES, HEAD, THICK):
        voxels = [math.prod(p.patch) * p.batch_size for p in (make_plan(data, gb) for gb in (8, 12, 24, 40, 80, 140))]
        assert voxels == sorted(voxels)


def test_a_coarse_axis_takes_its_finer_tenth():
    spacings = [[6.0, 0.6, 0.6]] * 15 + [[3.0, 0.6, 0.6]] * 5
    data = fingerprint([[16, 320, 320]] * 20, spacings, 1, 2)
    assert target_spacing(data) == (3.0, 0.6, 0.6)
    assert target_spacing(HEAD) == (1.0, 1.0, 1.0)


def test_a_coarse_axis_is_pooled_when_the_others_have_caught_up():
    strides, kernels = topology([16, 128, 128], [5.0, 1.0, 1.0])
    assert strides[:4] == [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]
    assert [k[0] for k in kernels[:4]] == [1, 1, 3, 3]
    assert all(k[1:] == [3, 3] for k in kernels)


def test_activations_count_every_convolution():
    with torch.device("meta"):
        net = build_network(in_channels=1, num_classes=2, strides=[1, 2], features=[4, 8])
    encoder = 2 * 4 * 8**3 + 2 * 8 * 4**3
    decoder = (4 + 2 * 4 + 2) * 8**3
    assert activations(net, 1, (8, 8, 8)) == encoder + decoder


def test_the_yaml_says_what_the_plan_is(tmp_path):
    plan = make_plan(THICK, 12)
    write_plan(plan, tmp_path / "plan.yaml")
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert content["data"] == {
        "spacing": list(plan.spacing),
        "patch_size": list(plan.patch),
        "batch_size": plan.batch_size,
    }
    heads = {"deep_supervision": 3}
    assert content["model"] == {"arch": "unet", "strides": plan.strides, "kernels": plan.kernels, **heads}
    with pytest.raises(InputError, match=r"plan: .*plan\.yaml exists"):
        write_plan(plan, tmp_path / "plan.yaml")


def test_too_little_memory_and_no_data_are_refused():
    with pytest.raises(InputError, match=r"plan: 0\.6 GB are too little"):
        make_plan(HEAD, 0.6)
    with pytest.raises(InputError, match="plan: the data set has no volumes"):
        fingerprint([], [], 1, 2)
