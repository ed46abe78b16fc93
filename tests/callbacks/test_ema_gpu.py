"""The average on a GPU against a float64 loop: skipped fp16 steps, bf16 weights, two processes over NCCL."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from lit_callbacks import EMA

from tests.callbacks.slow_average import BATCHES, Steps, Toy, run, slow_average, trainer_for, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HERE = Path(__file__).parent


def fitted(folder, precision, ema, **options):
    """Two epochs on the GPU; the states after every step that moved something, and the module at the end."""
    steps, model = Steps(), Toy(**options)
    trainer = trainer_for(folder, steps, ema, accelerator="gpu", devices=1, precision=precision, max_epochs=2)
    run(trainer, "fit", model)
    return steps, trainer, {name: value.cpu() for name, value in weights(model).items()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("offload", [False, True])
def test_steps_that_the_scaler_skips_do_not_count(tmp_path, fused, every, offload):
    """Infinite losses at batches 2 and 3 of each epoch, whose steps the GradScaler leaves out."""
    ema = EMA(decay=0.9, warmup=False, every_n_steps=every, buffers="copy", offload=offload)
    steps, trainer, state = fitted(tmp_path, "16-mixed", ema, fused=fused, inf_at=(2, 3))
    real = len(steps.history) - 1
    assert trainer.global_step == 2 * BATCHES
    # The scaler starts at 2^16, which a few more steps may overflow; at least the four infinite ones are left out.
    assert 0 < real <= 2 * BATCHES - 4
    if every == 1:
        assert ema.n_averaged == real
        expected = slow_average(steps.history, decay=0.9)
        for name in steps.names:
            torch.testing.assert_close(state[name].double(), expected[name].cpu(), rtol=1e-5, atol=1e-6)
    else:  # an interval holds two calls of the optimizer; with one of them skipped it counts one real step
        assert real // 2 <= ema.n_averaged <= real


def test_bf16_weights_have_an_fp32_average(tmp_path):
    ema = EMA(decay=0.9, warmup=False)
    steps, trainer, _ = fitted(tmp_path, "bf16-true", ema)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    expected = slow_average(steps.history, decay=0.9)
    for name in steps.names:
        assert saved[name].dtype == torch.float32
        torch.testing.assert_close(saved[name].double(), expected[name].cpu(), rtol=1e-5, atol=1e-6)


def test_an_update_does_not_wait_for_the_device():
    from lit_callbacks.average import WeightAverage

    average = WeightAverage(Toy().cuda(), average_buffers=True)
    keeps = (0.9, torch.tensor(0.9, device="cuda"))  # made here: this copy to the device waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        for keep in keeps:
            average.update(keep)
    finally:
        torch.cuda.set_sync_debug_mode("default")


SCRIPT = """
    import sys, torch, warnings
    sys.path[:0] = {paths!r}
    warnings.simplefilter("ignore")
    import torch.distributed as dist
    from lit_callbacks import EMA
    from slow_average import Steps, Toy, loader, slow_average, trainer_for, weights

    steps, ema, model = Steps(), EMA(decay=0.9, warmup=False, offload={offload}), Toy()
    trainer = trainer_for({folder!r}, steps, ema, accelerator="gpu", devices=2, strategy="ddp", precision="{precision}")
    trainer.fit(model, loader(), loader(1))
    expected = slow_average(steps.history, decay=0.9)
    state = weights(model)
    for name in steps.names:
        torch.testing.assert_close(state[name].cpu().double(), expected[name].cpu(), rtol=1e-5, atol=1e-6)
    found = [None, None]
    dist.all_gather_object(found, {{name: state[name].cpu() for name in steps.names}})
    assert all(torch.equal(found[0][name], found[1][name]) for name in steps.names)
    assert dist.get_backend() == "nccl"
    open({folder!r} + f"/checked {{trainer.global_rank}}", "w").close()
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("precision", "offload"), [("32-true", False), ("16-mixed", True)])
def test_two_processes_over_nccl_agree(tmp_path, precision, offload):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    script = tmp_path / "train.py"
    import lit_callbacks

    paths = [str(HERE), str(Path(lit_callbacks.__file__).parents[1])]
    script.write_text(
        textwrap.dedent(SCRIPT).format(paths=paths, folder=str(tmp_path), precision=precision, offload=offload)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("checked*")) == ["checked 0", "checked 1"]
