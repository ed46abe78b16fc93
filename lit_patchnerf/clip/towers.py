"""CLIP towers of timm, open_clip and transformers behind one preprocessing on the device."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_common.weights import first_line
from lit_patchnerf.clip.files import file_hash

__all__ = ["OpenClipProvider", "TimmProvider", "Towers", "TransformersProvider", "preprocess"]

VERSION = 1  # of the preprocessing; raise it when embeddings change
CHUNK = 64  # pictures or texts at once: 40 MB of input, which any device has
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
_WAY_OUT = "expected a way to the hub, or a local file in data.embeddings_weights (--weights), or file:PATH"
_NO_TEXTS = "expected texts from a file (--texts FILE.npz), open_clip:NAME/WEIGHTS or transformers:NAME"


class Towers(NamedTuple):
    """What a library loaded.

    Attributes:
        images: From (N, 3, *size) normalised pictures to (N, D).
        texts: From strings to (M, D); None without a text tower.
        size: (height, width) of the input in pixels.
        mean: Of each channel.
        std: Likewise.
        mode: Of the resizing, bicubic or bilinear.
    """

    images: Callable[[Tensor], Tensor]
    texts: Callable[[list[str]], Tensor] | None
    size: tuple[int, int]
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    mode: str = "bicubic"


def preprocess(
    images: Tensor,
    size: tuple[int, int],
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    mode: str = "bicubic",
) -> Tensor:
    """Resize pictures with antialiased interpolation and normalise them.

    A square picture becomes what CLIP's own preprocessing makes of it, within a grey level. Another one is squeezed,
    where CLIP would cut off its ends: a patch has to count as a whole.

    Args:
        images: (N, H, W, 3) uint8.
        size: (height, width) that the tower takes.
        mean: Of each channel, 0 to 1.
        std: Likewise.
        mode: bicubic or bilinear.

    Returns:
        (N, 3, *size) float32 on the images' device.
    """
    x = images.permute(0, 3, 1, 2).float()
    # Pillow, with which the towers were trained, does rows first and rounds to 8 bits after each of the two passes.
    for sides in ((x.shape[2], size[1]), size):
        if tuple(x.shape[2:]) != tuple(sides):
            x = F.interpolate(x, sides, mode=mode, antialias=True, align_corners=False).round().clamp(0, 255)
    shift, scale = (torch.tensor(list(v), device=x.device).reshape(1, 3, 1, 1) for v in (mean, std))
    return (x / 255 - shift) / scale


class _TowerProvider(ABC):
    """Loads towers when they are first used.

    Args:
        kind: Of the library.
        model: Name of the model there.
        weights: Local file or folder, over what the name stands for.
        device: That the towers run on.
    """

    def __init__(self, kind: str, model: str, weights: Path | None, device: torch.device | str) -> None:
        self.model, self.weights, self.device = model, weights, torch.device(device)
        self.name = f"{kind}:{model}"

    @abstractmethod
    def _load(self) -> Towers:
        """The towers on the device, in eval mode."""

    @cached_property
    def towers(self) -> Towers:
        """The towers; loading takes seconds, or a download."""
        try:
            return self._load()
        except InputError:
            raise
        except Exception as error:  # each hub and each client has exceptions of its own
            where = f"cannot load {self.weights}" if self.weights else "cannot get the weights"
            raise InputError(f"{self.name}: {where} ({first_line(error):.120}); {_WAY_OUT}") from error

    @property
    def key(self) -> str:
        """Hash of the name, the content of local weights, and the preprocessing."""
        return self._key

    @property
    def dim(self) -> int:
        """Length of an embedding; the towers are loaded for it."""
        return self._dim

    @cached_property
    def _key(self) -> str:
        files = []
        if self.weights is not None:
            folder = self.weights.is_dir()
            found = sorted(p for p in self.weights.iterdir() if p.is_file()) if folder else [self.weights]
            files = [file_hash(path) for path in found]
        return hashlib.sha256(json.dumps([VERSION, self.name, files]).encode()).hexdigest()[:24]

    @cached_property
    def _dim(self) -> int:
        return self.encode_images(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)).shape[1]

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Unit vectors of pictures: uint8 (N, H, W, 3) to float32 (N, D) on the provider's device."""
        towers = self.towers
        found = []
        for chunk in images.split(CHUNK):
            x = preprocess(chunk.to(self.device), *towers[2:])
            found.append(towers.images(x).float())
        return F.normalize(torch.cat(found), dim=1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts: float32 (M, D) on the provider's device.

        Raises:
            InputError: there is no text tower.
        """
        encode = self.towers.texts
        if encode is None:
            raise InputError(f"{self.name} has no text tower; {_NO_TEXTS}")
        chunks = [list(texts[i : i + CHUNK]) for i in range(0, len(texts), CHUNK)]
        return F.normalize(torch.cat([encode(chunk).float() for chunk in chunks]), dim=1)


class TimmProvider(_TowerProvider):
    """An image tower of timm; timm has none for texts.

    A CLIP model gives its projected embedding, any other one its pooled features.

    Args:
        model: Name such as `vit_base_patch32_clip_quickgelu_224.openai`. A warning names the right one where weights
            that were trained with QuickGELU would run with GELU.
        weights: Local file, else timm's hub.
        device: That it runs on.

    Raises:
        InputError: timm has no such model.
    """

    def __init__(self, model: str, weights: Path | None = None, device: torch.device | str = "cpu") -> None:
        import timm  # its import costs seconds

        super().__init__("timm", model, weights, device)
        name, _, tag = model.partition(".")
        if not timm.is_model(name):
            raise InputError(f"data.embeddings: timm has no model {name}, expected a name of timm.list_models()")
        try:
            config = timm.get_pretrained_cfg(model, allow_unregistered=False)
        except RuntimeError as error:
            tags = ", ".join(full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")) or "none"
            raise InputError(
                f"data.embeddings: timm has no weights {tag} of {name}, expected one of: {tags}"
            ) from error
        assert config is not None  # it raises where there is none
        # Fine-tuned CLIP models end in the classes of ImageNet.
        self._projects = "clip" in name and "_ft_" not in (config.tag or "")
        right = model.replace("_clip_", "_clip_quickgelu_")
        if "quickgelu" not in name and any("QuickGELU" in str(note) for note in config.notes or ()):
            rank_zero_warn(
                f"data.embeddings: the weights of timm:{model} were trained with QuickGELU, and this model computes "
                f"GELU, so embeddings are slightly off"
                + (f"; use timm:{right}" if timm.is_model(right.partition(".")[0]) else ""),
                category=UserWarning,
            )

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """There is no text tower.

        Raises:
            InputError: always, before anything is loaded.
        """
        raise InputError(f"{self.name} has no text tower; {_NO_TEXTS}")

    def _load(self) -> Towers:
        import timm
        from timm.data import resolve_model_data_config

        options: dict[str, Any] = {} if self._projects else {"num_classes": 0}
        if self.weights is not None:
            options["pretrained_cfg_overlay"] = {"file": str(self.weights), "source": ""}
        model = timm.create_model(self.model, pretrained=True, **options).eval().to(self.device)
        config = resolve_model_data_config(model)
        height, width = config["input_size"][1:]
        return Towers(model, None, (height, width), config["mean"], config["std"], _mode(config["interpolation"]))


class OpenClipProvider(_TowerProvider):
    """Both towers of an open_clip model.

    Args:
        model: `NAME/WEIGHTS` such as `ViT-B-16/laion2b_s34b_b88k`; with a local file the name is enough.
        weights: Local file, else the hub's.
        device: That it runs on.

    Raises:
        InputError: no weights are named.
    """

    def __init__(self, model: str, weights: Path | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__("open_clip", model, weights, device)
        self._architecture, _, self._tag = model.partition("/")
        if not self._tag and weights is None:
            raise InputError(f"data.embeddings is open_clip:{model}, expected open_clip:NAME/WEIGHTS")

    def _load(self) -> Towers:
        open_clip = _package("open_clip", self.name)
        if self._architecture not in open_clip.list_models():
            raise InputError(f"{self.name}: open_clip has no such model, expected one of open_clip.list_models()")
        known = open_clip.get_pretrained_cfg(self._architecture, self._tag) if self._tag else {}
        if self._tag and not known:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(self._architecture)[:5])
            raise InputError(f"{self.name}: open_clip has no such weights, expected one of: {tags}")
        model = open_clip.create_model(
            self._architecture,
            pretrained=str(self.weights) if self.weights is not None else self._tag,
            force_quick_gelu=bool(known.get("quick_gelu")),
            device=self.device,
        ).eval()
        config = open_clip.get_model_preprocess_cfg(model)
        side = config["size"]
        size = (side, side) if isinstance(side, int) else (side[0], side[1])
        tokenizer = open_clip.get_tokenizer(self._architecture)

        def texts(batch: list[str]) -> Tensor:
            return model.encode_text(tokenizer(batch).to(self.device))

        return Towers(model.encode_image, texts, size, config["mean"], config["std"], _mode(config["interpolation"]))


class TransformersProvider(_TowerProvider):
    """Both towers of a CLIP or SigLIP model of transformers.

    Args:
        model: Name on the hub, or a folder that `save_pretrained` wrote.
        weights: Such a folder, or the file of weights in it, over the name.
        device: That it runs on.

    Raises:
        InputError: the weights are a file without a `config.json` beside it.
    """

    def __init__(self, model: str, weights: Path | None = None, device: torch.device | str = "cpu") -> None:
        folder = weights.parent if weights is not None and weights.is_file() else weights
        if folder is not None and not (folder / "config.json").is_file():
            raise InputError(
                f"data.embeddings_weights: {folder} has no config.json, expected a folder that transformers wrote"
            )
        if folder is None and Path(model).is_dir():
            folder = Path(model)
        super().__init__("transformers", model, folder, device)

    def _load(self) -> Towers:
        library = _package("transformers", self.name)
        place = str(self.weights) if self.weights is not None else self.model
        model = library.AutoModel.from_pretrained(place, dtype=torch.float32).eval().to(self.device)
        if not hasattr(model, "get_image_features"):
            raise InputError(f"{self.name} is a {type(model).__name__}, expected a model of pictures and texts")
        settings = _image_settings(library, place, model.config)
        padding = "max_length" if "siglip" in model.config.model_type else True
        tokenizer: list[Any] = []  # loaded when a text comes: training needs none

        def texts(batch: list[str]) -> Tensor:
            if not tokenizer:
                try:
                    tokenizer.append(library.AutoTokenizer.from_pretrained(place))
                except Exception as error:
                    raise InputError(f"{self.name}: cannot load a tokenizer ({first_line(error):.100})") from error
            tokens = tokenizer[0](batch, padding=padding, truncation=True, return_tensors="pt").to(self.device)
            return _features(model.get_text_features(**tokens))

        return Towers(lambda x: _features(model.get_image_features(pixel_values=x)), texts, *settings)


def _features(output: Any) -> Tensor:
    """The projected embedding: transformers 4 gives the tensor itself, 5 puts it in the place of the pooled output."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _mode(name: object) -> str:
    """A resizing that torch has, by timm's and open_clip's words or Pillow's number."""
    return "bilinear" if name in ("bilinear", 2) else "bicubic"


def _image_settings(
    library: Any, place: str, config: Any
) -> tuple[tuple[int, int], Sequence[float], Sequence[float], str]:
    """Size, mean, standard deviation and resizing of a model's pictures."""
    side = config.vision_config.image_size
    size = (side, side) if isinstance(side, int) else (side[0], side[1])
    try:
        settings = library.AutoImageProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        if config.model_type != "clip":
            raise InputError(f"{place}: no preprocessor_config.json, expected one beside the weights") from error
        return size, MEAN, STD, "bicubic"  # all models of this type have CLIP's
    return size, settings.image_mean, settings.image_std, _mode(settings.resample)


def _package(name: str, provider: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        # transformers wants a huggingface-hub below 2, with which it is not in the extra.
        way = "pip install 'lit-vision-tasks[clip]'" if name == "open_clip" else f"pip install {name}"
        raise InputError(f"{provider} needs {name}, which is missing here ({first_line(error):.80}): {way}") from error
