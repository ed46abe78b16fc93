"""Figures of others that the tables of the video task stand beside: of papers, and what the original guide expects."""

from __future__ import annotations

from typing import NamedTuple

HNERV_PAPER = "HNeRV, arXiv 2304.02633, Table 2"
BOOST_PAPER = "Boosting-NeRV, arXiv 2402.18152, read off a figure, at 720 x 1280"
GUIDE = "the original guide, not measured"

# Frame PSNR in dB on Big Buck Bunny, 640 x 1280, 132 frames, 300 epochs, by millions of parameters. Decoder and
# embeddings are counted, the encoder is not.
HNERV_DB = {0.35: 30.15, 0.75: 32.81, 1.5: 35.57, 3.0: 37.43}
PUBLISHED_DB = {
    "NeRV": {0.35: 26.99, 0.75: 28.46, 1.5: 30.87, 3.0: 33.21},
    "E-NeRV": {0.35: 27.84, 0.75: 30.95, 1.5: 32.09, 3.0: 36.72},
    "HNeRV": HNERV_DB,
}
PUBLISHED_MS_SSIM = {"NeRV": {1.5: 0.9341}, "HNeRV": {1.5: 0.9773}}
BOOST_DB = {1.5: 37.75}
MARK_DB = HNERV_DB[1.5]

MILLIONS = {"bunny_0.35m": 0.35, "bunny_0.75m": 0.75, "bunny_1.5m": 1.5, "bunny_3m": 3.0}  # by profile


class Expected(NamedTuple):
    """What the guide expects of a profile: PSNR in dB from low to high, and hours, those of its table."""

    low_db: float
    high_db: float
    hours: float
    params_m: float


EXPECTED = {
    "a100_quality": Expected(30, 32, 10.0, 30),
    "a100_conservative": Expected(29, 31, 6.0, 25),
    "a100_moderate": Expected(28, 31, 3.5, 20),
    "a100_aggressive": Expected(26, 29, 2.0, 10),
}
