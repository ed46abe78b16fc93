"""Two processes that train together, one of which has no objects."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_detr.losses import DetectionLoss
from lit_detr.matching import Matcher
from lit_detr.models import build_network
from lit_detr.samples import pack_targets
from tests.helpers.distributed import in_two_processes

SIZE = (64, 64)
COUNTS = [[3, 1], [0, 0]]  # boxes per image of each process


def network(noise_queries):
    torch.manual_seed(0)
    net = build_network(
        num_classes=2, backbone="test_resnet", hidden=32, heads=4, feedforward=32, strides=(8, 16), decoder_layers=2,
        queries=20, noise_queries=noise_queries,
    ).train()  # fmt: skip
    for module in net.modules():  # statistics of half a batch are others
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net, DetectionLoss(Matcher()).train()


def batch(rank):
    g = torch.Generator().manual_seed(rank)
    boxes = [
        torch.cat([torch.rand(n, 2, generator=g), 0.1 + 0.1 * torch.rand(n, 2, generator=g)], 1) for n in COUNTS[rank]
    ]
    labels = [torch.randint(0, 2, (n,), generator=g) for n in COUNTS[rank]]
    return torch.rand(2, 3, *SIZE, generator=g), boxes, labels


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def step(rank):
    net, criterion = network(0)
    parallel = DistributedDataParallel(net)  # which waits for a gradient of every parameter
    images, boxes, labels = batch(rank)
    targets = pack_targets(boxes, labels)
    loss = criterion(parallel(images, None, targets), targets, SIZE)["loss"]
    loss.backward()
    return gradients(net)


def steps_with_noise(rank):
    net, criterion = network(10)
    parallel = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    losses = []
    for n in range(3):  # each process is without objects in turn, then both are
        images, boxes, labels = batch((rank + n) % 2 if n < 2 else 1)
        targets = pack_targets(boxes, labels)
        loss = criterion(parallel(images, None, targets), targets, SIZE)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": torch.tensor(losses), "weights": torch.cat([p.detach().flatten() for p in net.parameters()])}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_two_processes(both, tmp_path_factory.mktemp("ranks"))


def both(rank):
    return {"gradients": step(rank), **steps_with_noise(rank)}


def test_gradients_are_those_of_one_process_with_all_images(ranks):
    net, criterion = network(0)
    (images, boxes, labels), (more_images, more_boxes, more_labels) = batch(0), batch(1)
    targets = pack_targets(boxes + more_boxes, labels + more_labels)
    criterion(net(torch.cat([images, more_images]), None, targets), targets, SIZE)["loss"].backward()
    expected = gradients(net)
    largest = max(float(g.norm()) for g in expected.values())
    for rank in ranks:
        assert rank["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert (rank["gradients"][name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5 * largest, name


def test_a_process_without_objects_keeps_nobody_waiting(ranks):
    first, second = ranks
    assert torch.isfinite(first["losses"]).all()
    assert torch.isfinite(second["losses"]).all()
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)


def test_the_command_line_trains_on_two_devices(tmp_path):
    """With images that have no objects at all on one side: the annotation names a few of them only."""
    import cv2
    import numpy as np

    (tmp_path / "annotations").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        folder = tmp_path / split
        folder.mkdir()
        images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(count)]
        for image in images:
            cv2.imwrite(str(folder / image["file_name"]), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        one = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [10, 10, 12, 9], "area": 108, "iscrowd": 0}
        content = {"images": images, "annotations": [one], "categories": [{"id": 1, "name": "bird"}]}
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(content))
    arguments = [
        "--config", "demo", "--data.format", "coco", "--data.root", str(tmp_path), "--data.image_size", "64",
        "--data.channels", "3", "--data.batch_size", "2", "--data.synthetic_train", "8", "--model.hidden", "32",
        "--model.feedforward", "32", "--model.strides", "[8,16]", "--model.queries", "20", "--model.eval_queries", "20",
        "--model.noise_queries", "10", "--trainer.devices", "2", "--trainer.strategy", "ddp",
        "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1",
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'callbacks'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lit_detr", "fit", *arguments]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr + done.stdout
