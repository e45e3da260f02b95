"""Fixtures that several rooms share: tiny models of each architecture, and one short finished run."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import joblib
import pytest
from hypothesis import HealthCheck, settings

from vitft.io import console

console.SAY_AFTER_S = 3600.0  # what is being worked on would be among the lines that tests count, on a busy machine

# Models here are so small that a second thread costs more than it brings, above all on a busy machine.
# Set before torch is first imported, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = TINY_THREADS = os.environ.get("VITFT_TEST_THREADS", "1")
os.environ["VITFT_CACHE"] = CACHE = tempfile.mkdtemp(prefix="vitft-tests-")  # decoded photos of tests are no user's

# Syncing takes milliseconds for each small file, a large part of a tiny run. Its order is tested where files are
# written; no test cuts the power.
os.fsync = lambda handle: None

# hypothesis would fail a test whose example takes 0.2 s, or is slowly drawn: on a busy machine any may.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: a CPU for each thread. A worker imports torch and takes up to 2 GB, so four are enough."""
    return max(1, min(4, joblib.cpu_count() // int(TINY_THREADS)))


def pytest_collection_finish() -> None:
    """Spare every training what it would do anew, in most of its time: encode the digits, measure the machine's peak.

    `test_source` tests the one and `test_bench` the other. Where nothing of it was imported, nothing will train soon.
    """
    if "vitft.training.trainer" in sys.modules:
        from vitft.data.sources import arrays
        from vitft.training.cost import throughput

        digits = cache(arrays.read_digits)
        arrays.read_digits = lambda: dict(digits())
        throughput.peak_flops = lambda device, precision, seconds: 2e13  # no CPU reaches it


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(CACHE, ignore_errors=True)


ARCHITECTURES = ("vit", "deit", "beit", "dinov2", "swin")


def tiny_model(architecture: str, image_size: int = 32, **settings: Any) -> Any:
    """A random classifier of a few thousand weights, whose logits are spread and depend on positions."""
    import torch
    import transformers as tf

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
    }
    swin = {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    known = {
        "vit": (tf.ViTConfig, sizes | {"intermediate_size": 32}),
        "deit": (tf.DeiTConfig, sizes | {"intermediate_size": 32}),
        "beit": (tf.BeitConfig, sizes | {"intermediate_size": 32, "use_relative_position_bias": True}),
        "dinov2": (tf.Dinov2Config, sizes | {"mlp_ratio": 2}),
        "swin": (tf.SwinConfig, swin),
    }
    make, own = known[architecture]
    config = make(**own | {"image_size": image_size, "num_labels": 3} | settings)
    torch.manual_seed(7)
    name = {"vit": "ViT", "deit": "DeiT", "beit": "Beit", "dinov2": "Dinov2", "swin": "Swin"}[architecture]
    model = getattr(tf, f"{name}ForImageClassification")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" in name or "classifier.weight" in name:
                parameter.normal_(std=0.5)
    return model


@pytest.fixture(autouse=True)
def flags_were_typed() -> Iterator[None]:
    """Errors name settings as a command does, wherever a test calls what would raise them."""
    from vitft.errors import typed_flags

    with typed_flags():
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny model as Transformers does, and gives its folder."""

    def save(architecture: str = "vit", labels: tuple[str, ...] = ("ant", "bee", "cat"), **settings: Any) -> Path:
        dtype = settings.pop("dtype", None)
        names = dict(enumerate(labels))
        settings |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        settings["num_labels"] = len(labels)
        model = tiny_model(architecture, **settings)
        folder = tmp_path / f"{architecture}-{len(list(tmp_path.iterdir()))}"
        (model if dtype is None else model.to(dtype)).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of three steps on the digits: a run with best, last and a step's folder."""
    from vitft import TrainConfig, train

    config = TrainConfig(
        dataset="digits", model="vit-micro", from_scratch=True, max_steps=3, batch_size=16, layers=2,
        width=32,
        heads=2, image_size=16, patch_size=4, max_eval_samples=150, eval_every=2, save_every=2, keep_finished=2,
        lr=1e-3,
        device="cpu", precision="fp32",
    )  # fmt: skip
    return train(config, output=tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as four shards, with 64 images in a row group."""
    from vitft.data import packing
    from vitft.data.decoder import MAX_PIXELS
    from vitft.data.sources.source import open_dataset

    folder = tmp_path_factory.mktemp("shards") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_ROW_GROUP", 64)
        patch.setattr(packing, "_SMALL_GROUP", 0)
        packing.pack(open_dataset("digits"), folder, shard_bytes=60_000, max_pixels=MAX_PIXELS)
    return folder


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is fetched. Nothing in it, and no open shard, is left by other tests."""
    from vitft.data.streaming import blocks, remote, shards

    monkeypatch.setenv("VITFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(blocks, "_mapped", {})
    monkeypatch.setattr(shards, "_shards", {})
    monkeypatch.setattr(remote, "_WAIT_S", 0.001)
    return tmp_path / "cache" / "streamed"


@pytest.fixture
def server(digit_shards: Path, fetched: Path) -> Iterator[Any]:
    """Serves the shards of digits, as /digits."""
    from tests.web import FileServer

    with FileServer(digit_shards.parent) as running:
        yield running


@pytest.fixture(scope="session")
def object_store(digit_shards: Path) -> Iterator[str]:
    """An S3 server on loopback, `host:port`, with the shards of digits in BUCKET."""
    import boto3
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    place = ":".join(map(str, store.get_host_and_port()))
    session = boto3.Session(*BUCKET_KEYS.values())
    client = session.client("s3", endpoint_url=f"http://{place}", region_name="us-east-1")
    client.create_bucket(Bucket="photos")
    for file in digit_shards.iterdir():
        client.put_object(Bucket="photos", Key=f"sets/digits/{file.name}", Body=file.read_bytes())
    yield place
    store.stop()


BUCKET, BUCKET_KEYS = "s3://photos/sets/digits", {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}


@pytest.fixture
def bucket(object_store: str, fetched: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Stands before the object store, and is what s3:// means."""
    import s3fs

    from tests.web import FaultyStore

    with FaultyStore(object_store) as running:
        for name, value in (BUCKET_KEYS | {"AWS_ENDPOINT_URL": running.url}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()  # those of other stores and credentials
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. One a module, because Playwright's loop lives in one thread as long as it is open."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    if (chromium := next(filter(None, found), None)) is None:
        pytest.skip("no Chromium")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=quiet)
        yield started
        started.close()


@pytest.fixture
def fonts_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has just one further font installed, called as a real one, that draws these letters, each as a square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    from vitft.io import fonts

    def install(letters: str) -> None:
        pen = TTGlyphPen(None)
        for place, point in enumerate([(0, 0), (0, 700), (700, 700), (700, 0)]):
            (pen.lineTo if place else pen.moveTo)(point)
        pen.closePath()
        names = [".notdef", *(f"u{ord(letter)}" for letter in letters)]
        font = FontBuilder(1000, isTTF=True)
        font.setupGlyphOrder(names)
        font.setupCharacterMap({ord(letter): f"u{ord(letter)}" for letter in letters})
        font.setupGlyf(dict.fromkeys(names, pen.glyph()))
        font.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
        font.setupHorizontalHeader(ascent=800, descent=-200)
        font.setupNameTable({"familyName": "Noto Sans CJK JP", "styleName": "Regular"})
        font.setupOS2()
        font.setupPost()
        file = tmp_path / "NotoSansCJK.ttf"
        font.save(file)
        monkeypatch.setattr(fonts, "_file", {"Noto Sans CJK JP": str(file)}.get)

    monkeypatch.setattr(fonts, "_file", lambda font: None)
    return install
