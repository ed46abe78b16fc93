import builtins
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch.nn import functional as F

import lit_patchnerf.clip.targets
import lit_patchnerf.clip.towers
from lit_patchnerf.clip import embedding_table, open_provider
from lit_patchnerf.clip.targets import cache_files, encode_video
from lit_patchnerf.clip.towers import CHUNK, MEAN, STD, preprocess
from lit_patchnerf.store import from_frames, prepare_video
from lit_patchnerf.synthetic import SyntheticVideo
from lit_patchnerf.video import VideoFacts, write_frames
from tests.helpers.errors import refused

TINY = "test_vit"  # 64-dimensional features, 160 x 160 pixels


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def plain(colour, size: int = 12) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8).expand(1, size, size, 3)


def scene(frames: int = 5, **wanted):
    drawn = SyntheticVideo(frames=frames, height=32, width=64)
    return from_frames(drawn.draw(), drawn.facts(), **{"grid": (2, 4), **wanted})


@pytest.fixture
def tiny_weights(tmp_path) -> Path:
    torch.manual_seed(0)
    torch.save(timm.create_model(TINY, pretrained=False).state_dict(), tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


class Counted:
    """The toy encoder, and how many pictures it encoded."""

    def __init__(self, key: str = "a") -> None:
        self._toy = open_provider("toy:20")
        self.name, self.key, self.dim, self.count = "counted", key, 20, 0

    def encode_images(self, images):
        self.count += len(images)
        return self._toy.encode_images(images)

    def encode_texts(self, texts):
        return self._toy.encode_texts(texts)


# ---- Preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "size"), [(320, 320, (224, 224)), (50, 70, (96, 96)), (90, 130, (32, 48))])
def test_resizing_is_that_of_pillow(height, width, size):
    picture = pictures(height, width, 3)
    expected = np.asarray(Image.fromarray(picture.numpy()).resize(size[::-1], Image.Resampling.BICUBIC), np.float32)
    found = preprocess(picture[None], size, (0, 0, 0), (1, 1, 1))[0].permute(1, 2, 0).numpy() * 255
    difference = np.abs(found - expected)
    assert difference.max() <= 1.01  # grey levels; Pillow computes in fixed point
    assert (difference > 0.5).mean() < 0.002


def test_normalisation_and_no_resizing():
    picture = pictures(2, 16, 16, 3)
    expected = (picture.numpy() / 255 - np.array(MEAN)) / np.array(STD)
    found = preprocess(picture, (16, 16)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


# ---- The toy ---------------------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 25, 25), "green": (40, 165, 50), "blue": (40, 60, 215), "white": (245, 245, 245)}


@pytest.mark.parametrize("text", ["toy", "toy:20", "toy:64"])
def test_toy_texts_find_their_colours(text):
    toy = open_provider(text)
    embeddings = torch.cat([toy.encode_images(plain(colour)) for colour in COLOURS.values()])
    texts = toy.encode_texts([f"a {name} thing" for name in COLOURS])
    assert (texts @ embeddings.T).argmax(1).tolist() == [0, 1, 2, 3]
    assert embeddings.shape == (4, toy.dim)
    for vectors in (embeddings, texts):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))


def test_toy_brightness_edges_and_unknown_words():
    toy = open_provider("toy")
    dark, light = toy.encode_images(plain((10, 60, 15))), toy.encode_images(plain((150, 245, 160)))
    words = toy.encode_texts(["dark green", "bright green"])
    assert ((words @ torch.cat([dark, light]).T).argmax(1)).tolist() == [0, 1]
    stripes = plain((128, 128, 128)).clone()
    stripes[:, :, ::2] = 160
    stripes[:, :, 1::2] = 96
    both = torch.cat([toy.encode_images(stripes), toy.encode_images(plain((128, 128, 128)))])
    assert (toy.encode_texts(["Striped!", "smooth"]) @ both.T).argmax(1).tolist() == [0, 1]
    assert torch.equal(*toy.encode_texts(["object", "qwertz"]))  # any colour


def test_toy_keeps_the_angles_of_its_statistics():
    x = pictures(6, 9, 9, 3)
    small, large = (open_provider(f"toy:{dim}").encode_images(x) for dim in (16, 128))
    torch.testing.assert_close(small @ small.T, large @ large.T)
    assert open_provider("toy:3").encode_images(x).shape == (6, 3)
    assert torch.isfinite(open_provider("toy").encode_images(pictures(2, 1, 1, 3))).all()


def test_toy_is_deterministic_and_its_key_tells_lengths_apart():
    x = pictures(3, 20, 10, 3)
    assert torch.equal(open_provider("toy").encode_images(x), open_provider("toy:32").encode_images(x))
    assert open_provider("toy").key == open_provider("toy:32").key != open_provider("toy:31").key


# ---- Bad texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "toy:", "toy:0", "toy:x", "clip", "timm", "timm:", "open_clip:", "file:", "toys"])
def test_unknown_providers_are_refused(text):
    refused(lambda: open_provider(text), "data.embeddings")


def test_weights_are_checked_before_anything_is_loaded(tmp_path):
    refused(lambda: open_provider("toy", tmp_path), "data.embeddings_weights", "toy")
    refused(lambda: open_provider(f"timm:{TINY}", tmp_path / "none.pth"), "data.embeddings_weights", "none.pth")
    (tmp_path / "w.pth").touch()
    refused(lambda: open_provider("transformers:x", tmp_path / "w.pth"), "config.json")
    refused(lambda: open_provider("open_clip:ViT-B-16"), "NAME/WEIGHTS")


# ---- timm ------------------------------------------------------------------------------------------------------------


def test_timm_embeddings_are_those_of_the_model(tiny_weights):
    provider = open_provider(f"timm:{TINY}", tiny_weights)
    model = timm.create_model(TINY, pretrained=False, num_classes=0).eval()
    state = torch.load(tiny_weights, weights_only=True)
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    x = pictures(3, 40, 50, 3)
    config = resolve_model_data_config(model)
    with torch.no_grad():
        expected = F.normalize(model(preprocess(x, config["input_size"][1:], config["mean"], config["std"])), dim=1)
    found = provider.encode_images(x)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    assert provider.dim == found.shape[1] == model.num_features
    many = pictures(CHUNK + 1, 8, 8, 3)
    torch.testing.assert_close(provider.encode_images(many)[-1:], provider.encode_images(many[-1:]), atol=1e-5, rtol=0)


def test_timm_key_follows_the_weights(tiny_weights, tmp_path):
    first = open_provider(f"timm:{TINY}", tiny_weights).key
    copy = tmp_path / "copy.pth"
    copy.write_bytes(tiny_weights.read_bytes())
    assert open_provider(f"timm:{TINY}", copy).key == first
    copy.write_bytes(b"other")
    assert open_provider(f"timm:{TINY}", copy).key != first
    assert open_provider(f"timm:{TINY}").key != first
    refused(lambda: open_provider(f"timm:{TINY}", copy).encode_images(pictures(1, 8, 8, 3)), "copy.pth")


def test_timm_names():
    refused(lambda: open_provider("timm:vit_nothing"), "vit_nothing")
    refused(lambda: open_provider("timm:vit_base_patch32_clip_224.nowhere"), "nowhere", "openai")
    right = "timm:vit_base_patch32_clip_quickgelu_224.openai"
    with pytest.warns(UserWarning, match=right):
        open_provider("timm:vit_base_patch32_clip_224.openai")
    provider = open_provider(right)  # no warning, which would be an error
    refused(lambda: provider.encode_texts(["a fox"]), "no text tower", "--texts", "open_clip:")


def test_timm_without_a_hub(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    provider = open_provider("timm:vit_base_patch32_clip_quickgelu_224.openai")
    refused(lambda: provider.encode_images(pictures(1, 8, 8, 3)), "no route", "data.embeddings_weights", "file:PATH")


# ---- open_clip and transformers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["open_clip:ViT-B-16/openai", "transformers:some/model"])
def test_a_missing_package_names_the_extra(name, monkeypatch):
    def missing(package):
        raise ImportError(f"No module named {package!r}")

    monkeypatch.setattr(lit_patchnerf.clip.towers, "import_module", missing)
    provider = open_provider(name)  # only encoding needs it
    refused(
        lambda: provider.encode_texts(["a"]),
        "lit-vision-tasks[clip]" if name.startswith("open_clip") else "pip install transformers",
        name,
    )


def test_open_clip_contract(monkeypatch, tmp_path):
    """Against a stand-in with open_clip's functions."""
    made = {}

    class Model(torch.nn.Module):
        def encode_image(self, x):
            made["input"] = tuple(x.shape)
            return x.mean((2, 3)) + 2

        def encode_text(self, tokens):
            return tokens.float()

    def create_model(name, pretrained, force_quick_gelu, device):
        made.update(name=name, pretrained=pretrained, quick=force_quick_gelu)
        return Model()

    stand_in = SimpleNamespace(
        list_models=lambda: ["ViT-X"],
        get_pretrained_cfg=lambda name, tag: {"quick_gelu": True} if tag == "openai" else {},
        list_pretrained_tags_by_model=lambda name: ["openai"],
        create_model=create_model,
        get_model_preprocess_cfg=lambda m: {"size": (20, 24), "mean": MEAN, "std": STD, "interpolation": "bicubic"},
        get_tokenizer=lambda name: lambda batch: torch.tensor([[len(t), 1, 0] for t in batch]),
    )
    monkeypatch.setattr(lit_patchnerf.clip.towers, "import_module", lambda name: stand_in)
    provider = open_provider("open_clip:ViT-X/openai")
    assert provider.dim == 3
    torch.testing.assert_close(provider.encode_texts(["abc"]), F.normalize(torch.tensor([[3.0, 1, 0]]), dim=1))
    assert made == {"input": (1, 3, 20, 24), "name": "ViT-X", "pretrained": "openai", "quick": True}
    weights = tmp_path / "w.pt"
    weights.touch()
    assert open_provider("open_clip:ViT-X", weights).dim == 3
    assert (made["pretrained"], made["quick"]) == (str(weights), False)
    refused(lambda: open_provider("open_clip:ViT-X/none").dim, "openai")
    refused(lambda: open_provider("open_clip:ViT-Y/none").dim, "list_models")


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_contract(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, **text}, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=12
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    x = pictures(3, 20, 30, 3)
    provider = open_provider(f"transformers:{tmp_path}")
    with torch.no_grad():
        found = model.get_image_features(pixel_values=preprocess(x, (32, 32)))
    expected = found if isinstance(found, torch.Tensor) else found.pooler_output
    torch.testing.assert_close(provider.encode_images(x), F.normalize(expected, dim=1))
    assert open_provider("transformers:any", tmp_path / "model.safetensors").dim == 12
    refused(lambda: open_provider(f"transformers:{tmp_path / 'none'}").dim, "none")


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors"])
def test_a_table_from_a_file(tmp_path, suffix):
    video = scene()
    table = torch.randn(5, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"table.{suffix}"
    if suffix == "npy":
        np.save(path, table.numpy())
    elif suffix == "npz":
        np.savez(path, embeddings=table.numpy(), texts=np.array(["a fox", "A tree"]), text_embeddings=np.eye(2, 6) * 3)
    else:
        save_file = pytest.importorskip("safetensors.torch").save_file
        texts = {"texts": json.dumps(["a fox", "A tree"])}
        save_file({"embeddings": table, "text_embeddings": torch.eye(2, 6)}, path, texts)
    found = embedding_table(video, f"file:{path}", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()  # it is a file already
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), F.normalize(table, dim=-1), atol=1e-3, rtol=0)
    provider = open_provider(f"file:{path}")
    assert provider.dim == 6
    if suffix == "npy":
        refused(lambda: provider.encode_texts(["a fox"]), "a fox", "none")
    else:
        torch.testing.assert_close(provider.encode_texts([" a TREE", "a fox"]), torch.eye(2, 6).flip(0))
        refused(lambda: provider.encode_texts(["a cat"]), "a cat", "a fox, A tree")
    refused(lambda: provider.encode_images(pictures(1, 8, 8, 3)), "cannot encode pictures")


def test_bad_files(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        return lambda: open_provider(f"file:{tmp_path / 'x.npz'}")

    table = np.ones((5, 2, 4, 6), np.float32)
    refused(lambda: open_provider(f"file:{tmp_path / 'none.npz'}"), "none.npz")
    refused(write(other=table), "other", "embeddings")
    refused(write(embeddings=table[0]), "(2, 4, 6)", "(T, rows, cols, D)")
    refused(write(embeddings=table * np.nan), "finite")
    refused(write(embeddings=table.astype(int)), "finite floats")
    refused(write(text_embeddings=np.ones((2, 6)), texts=np.array(["one"])), "1 texts")
    refused(write(embeddings=table, text_embeddings=np.ones((1, 5)), texts=np.array(["one"])), "expected 6")
    refused(write(text_embeddings=np.ones((1, 6)), texts=np.array(["one"], object)), "cannot be read")
    (tmp_path / "x.npz").write_bytes(b"no archive")
    refused(lambda: open_provider(f"file:{tmp_path / 'x.npz'}"), "cannot be read")
    np.save(tmp_path / "t.npy", table[:4])
    refused(lambda: embedding_table(scene(), f"file:{tmp_path / 't.npy'}"), "4x2x4", "5x2x4")
    write(text_embeddings=np.ones((1, 6)), texts=np.array(["one"]))
    refused(lambda: embedding_table(scene(), f"file:{tmp_path / 'x.npz'}"), "texts alone")


# ---- The table and its cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [{}, {"grid": (1, 1)}, {"crop": (24, 40), "grid": (3, 2)}, {"grid": (3, 5)}])
def test_patches_are_cut_from_the_cropped_frames(wanted):
    video = scene(frames=3, **wanted)
    provider = open_provider("toy:20")
    table = encode_video(video, provider)
    (rows, cols), (h, w) = video.geometry.grid, video.geometry.patch
    for t in range(3):
        for r in range(rows):
            for c in range(cols):
                patch = video.frames[t, r * h : (r + 1) * h, c * w : (c + 1) * w]
                expected = provider.encode_images(torch.from_numpy(patch.copy())[None])[0]
                torch.testing.assert_close(table[t, r, c].float(), expected, atol=1e-3, rtol=0)


def test_the_cache_is_used_and_says_what_it_is_of(tmp_path):
    video, provider = scene(), Counted()
    first = embedding_table(video, provider, cache_dir=tmp_path)
    assert provider.count == 40
    again = embedding_table(video, provider, cache_dir=tmp_path)
    assert provider.count == 40
    assert torch.equal(first, again)
    assert (first.dtype, tuple(first.shape)) == (torch.float16, (5, 2, 4, 20))
    file, beside = cache_files(video, provider, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([file, beside])
    about = json.loads(beside.read_text())
    assert about["of"]["geometry"] == video.geometry.to_dict()
    assert (about["of"]["video"], about["of"]["key"], about["made"]["dim"]) == (video.facts.digest, "a", 20)


def test_what_makes_other_embeddings_makes_another_table(tmp_path, monkeypatch):
    video, provider = scene(), Counted()

    def encoded(video=video, provider=provider) -> bool:
        before = provider.count
        embedding_table(video, provider, cache_dir=tmp_path)
        return provider.count > before

    assert encoded()
    assert encoded(scene(grid=(1, 2)))
    assert encoded(scene(crop=(16, 64)))
    assert encoded(scene(frames=4))
    assert encoded(provider=Counted("b"))
    painted = video.frames.copy()
    painted[3] = 255 - painted[3]
    assert encoded(replace(video, frames=painted))  # a folder's image that was changed in place
    assert not encoded()
    monkeypatch.setattr(lit_patchnerf.clip.targets, "VERSION", 99)
    assert encoded()


@pytest.mark.parametrize("damage", ["half", "flipped", "empty", "text", "shape", "type", "json", "no json", "other"])
def test_a_damaged_table_is_made_anew(tmp_path, damage):
    video, provider = scene(), Counted()
    expected = embedding_table(video, provider, cache_dir=tmp_path)
    file, beside = cache_files(video, provider, tmp_path)
    content = file.read_bytes()
    middle = len(content) // 2
    if damage in ("shape", "type"):
        wrong = expected[:-1] if damage == "shape" else expected.float()
        np.savez(file, embeddings=wrong.numpy())
    elif damage == "json":
        beside.write_text("{")
    elif damage == "no json":
        beside.unlink()
    elif damage == "other":
        about = json.loads(beside.read_text())
        about["of"]["key"] = "b"
        beside.write_text(json.dumps(about))
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        file.write_bytes({"half": content[:middle], "flipped": flipped, "empty": b"", "text": b"no"}[damage])
    provider.count = 0
    for count in (40, 40):  # once anew, and then from the cache
        assert torch.equal(embedding_table(video, provider, cache_dir=tmp_path), expected)
        assert provider.count == count


def test_a_disk_that_fails_costs_only_the_cache(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").touch()
    video = scene()
    expected = embedding_table(video, "toy:20")
    assert torch.equal(embedding_table(video, "toy:20", cache_dir=tmp_path / "file" / "cache"), expected)
    assert "no cache of embeddings" in caplog.text

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    assert torch.equal(embedding_table(video, "toy:20", cache_dir=tmp_path / "cache"), expected)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_tower_that_gives_no_numbers_is_refused(tmp_path):
    class Broken(Counted):
        def encode_images(self, images):
            return super().encode_images(images) * float("nan")

    refused(lambda: embedding_table(scene(), Broken(), cache_dir=tmp_path), "counted", "no numbers")
    assert list(tmp_path.iterdir()) == []


def test_a_cached_table_needs_no_towers(tmp_path, tiny_weights, monkeypatch):
    video = scene(frames=2, grid=(1, 1))
    first = embedding_table(video, f"timm:{TINY}", tiny_weights, tmp_path / "cache")

    def never(*args, **kwargs):
        raise AssertionError("loaded again")

    monkeypatch.setattr(timm, "create_model", never)
    assert torch.equal(embedding_table(video, f"timm:{TINY}", tiny_weights, tmp_path / "cache"), first)


def test_mapped_frames_are_encoded_alike(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    write_frames(tmp_path / "clip", frames)
    video = prepare_video(tmp_path / "clip", grid=(2, 3), cache_dir=tmp_path / "cache")
    memory = from_frames(frames, VideoFacts("drawn", (16, 24), 3, 24.0, "x"), grid=(2, 3))
    assert torch.equal(embedding_table(video, "toy"), embedding_table(memory, "toy"))


def test_the_library_imports_no_towers(monkeypatch):
    original = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name.partition(".")[0] not in ("open_clip", "transformers")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    open_provider("toy").encode_texts(["red"])
    open_provider("transformers:some/model")
    open_provider("open_clip:ViT-B-16/openai")
