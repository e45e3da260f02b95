"""The list of pretrained models: what the hub says, and what is left without it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.hub import MODEL, StandInHub, make_model
from vitft.cli.app import app
from vitft.cli.tables import models_report
from vitft.models.catalog import FAMILIES, TRIED, Known, catalog
from vitft.models.load import BUNDLED, load_trained

GATED = "facebook/dinov2-small"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInHub]:
    root = tmp_path_factory.mktemp("hub")
    make_model(root / "models" / MODEL)
    (root / "models" / MODEL / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A card\n")
    with StandInHub(root) as running:
        yield running


def listed(endpoint: str, cache: Path) -> dict[str, Any]:
    """What `vitft models ls --json` prints, by model."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-m", "vitft", "models", "ls", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {one["model"]: one for one in json.loads(done.stdout)["models"]}


def test_the_hub_says_what_a_model_is_and_the_cache_keeps_it(hub: StandInHub, tmp_path: Path) -> None:
    with StandInHub(Path()) as gone:
        down = gone.url
    online = listed(hub.url, tmp_path)
    assert list(online) == [model for names in FAMILIES.values() for model in names]
    known = online[MODEL]
    # Patches 768 x 32 + 32, class token 32, 5 positions; 2 blocks of 4 x (32 x 32 + 32) attention, 32 x 64 x 2 + 96 MLP
    # and 2 norms of 64; a norm of 64; a head of 2 x 32 + 2.
    assert known["parameters"] == 24_608 + 32 + 160 + 2 * (4_224 + 4_192 + 128) + 64 + 66
    assert (known["architecture"], known["image_size"], known["license"]) == ("vit", [32, 32], "apache-2.0")
    assert f"{GATED}: " in online[GATED]["problem"]
    offline = listed(down, tmp_path)
    assert offline[MODEL] == known
    assert offline[GATED]["problem"] == "not in the cache, and no network"


def test_the_bundled_model_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.models.catalog.answers", lambda *_: False)
    monkeypatch.setattr("vitft.models.catalog.FAMILIES", {"bundled": (BUNDLED,)})
    (bundled,) = catalog()
    assert (bundled.architecture, bundled.image_size, bundled.problem) == ("vit", (28, 28), "")
    model = load_trained(BUNDLED).model  # has a head of ten classes, of 64 weights and a bias each; two are counted
    assert bundled.parameters == sum(weights.numel() for weights in model.parameters()) - 8 * 65
    shown, given = (CliRunner().invoke(app, ["models", "ls", *words]).stdout for words in ([], ["--json"]))
    assert BUNDLED in shown
    assert TRIED in " ".join(shown.split())
    assert json.loads(given)["tried"] == TRIED


def test_the_table_fits_a_terminal() -> None:
    models = [
        Known("facebook/dinov3-convnext-tiny-pretrain-lvd1689m", "a", "dinov3_convnext", 27_800_000, None, "other"),
        Known("owner/name", "b", "vit", 86_400_000, (224, 224), "apache-2.0"),
        Known("owner/gone", "b", problem="owner/gone: not found"),
    ]
    console = Console(width=80, record=True, force_terminal=False)
    console.print(models_report(models, TRIED))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines if line.strip() in ("a", "b")] == ["a", "b"]
    assert any(line.split()[-4:] == ["27.8", "M", "any", "other"] for line in lines)
    assert any(line.split()[1:] == ["86.4", "M", "224", "apache-2.0"] for line in lines)
    assert "owner/gone: not found" in lines[-1]
    assert TRIED in " ".join(" ".join(lines).split())
