"""`python -m lit_callbacks.export run/last.ckpt weights.safetensors`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_callbacks.export import checkpoint_weights, export_weights, plain_values


def main(args: Sequence[str] | None = None) -> int:
    """Convert a checkpoint; the exit status, which is 2 after an error of one line."""
    parser = argparse.ArgumentParser(
        prog="python -m lit_callbacks.export",
        description="Write the weights of a Lightning checkpoint, with an EMA the average, as one file.",
    )
    parser.add_argument("checkpoint", help="file of ModelCheckpoint")
    parser.add_argument("file", help="name that ends in .safetensors or .pt")
    parser.add_argument("--prefix", default="", help="only tensors whose name begins with this, which is cut off")
    parser.add_argument(
        "--trust", action="store_true", help="also load objects of any class, which runs code from the checkpoint"
    )
    options = parser.parse_args(args)
    try:
        state, hyper_parameters = checkpoint_weights(options.checkpoint, weights_only=not options.trust)
        path = export_weights(options.file, state, hyper_parameters, prefix=options.prefix)
    except (OSError, ValueError, MisconfigurationException) as error:
        text = " ".join(str(error).split()).replace("weights_only=False", "--trust")
        print(f"{parser.prog}: error: {text}", file=sys.stderr)
        return 2
    dropped = plain_values(hyper_parameters)[1]
    print(f"written: {path}" + (f"; without {', '.join(dropped)}, which are not plain" if dropped else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
