"""Real processes beside this one, for what must be exact under distributed training and what only a signal shows."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import multiprocessing


def another_process(function, *args):
    """A process, not started yet, that runs a module's function: neither a copy of this one nor with its threads.

    Where the system allows it, such processes share one that has the imports behind it: these take seconds each.
    """
    shared = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if shared else "spawn")
    if shared:
        context.set_forkserver_preload(["lightning.pytorch", "torchmetrics", "lit_cli.cli"])
    return context.Process(target=function, args=args)


def in_two_processes(function, folder):
    """What `function(rank)`, of a module's top level, returns in each of two processes that can talk to each other."""
    # This process is the first of the two: most of the time goes into imports.
    child = another_process(_process, 1, function, str(folder))
    child.start()
    _process(0, function, str(folder))
    child.join()
    assert child.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _process(rank, function, folder):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    try:
        torch.save(function(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
