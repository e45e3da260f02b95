"""A model on the hub: uploaded by the real client to a stand-in, and read back from there."""

import dataclasses
import getpass
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub as hf
import pytest
import torch
import yaml
from huggingface_hub import constants
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from tests.hub import TOKEN, StandInHub
from vitft import load_model, train
from vitft.checkpoints.checkpoint import save_model
from vitft.checkpoints.metadata import read_card, write_card
from vitft.checkpoints.model_card import readme
from vitft.cli.app import app
from vitft.errors import ModelError, UsageError
from vitft.publishing.push import push

REPO = "ada/digits"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A hub where one is logged in, as ada."""
    (tmp_path / "hub").mkdir()
    with StandInHub(tmp_path / "hub") as running:
        running.owners.add("ada")
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def run(digits_run: Any, tmp_path: Path) -> Path:
    """A run in a folder whose name says who trains where, and so do its settings."""
    place = tmp_path / "home" / "grace-hopper" / "runs" / "digits"
    shutil.copytree(digits_run.run, place)
    return place


def files(hub: StandInHub, repo: str = REPO, branch: str | None = None) -> dict[str, bytes]:
    folder = hub.root / "models" / repo if branch is None else hub.root / "branches" / "models" / repo / branch
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_pushed_model_has_the_same_logits_read_back(hub: StandInHub, run: Path, capsys: Any) -> None:
    done = push(run, REPO, license="apache-2.0")
    assert capsys.readouterr().err == ""
    assert done.url == f"{hub.url}/{REPO}"
    assert set(done.files) == set(files(hub)) == {
        "config.json", "model.safetensors", "novelty.safetensors", "preprocessor_config.json", "vitft.json",
        "README.md",
    }  # fmt: skip
    local, back = load_model(run), load_model(REPO)
    pixels = torch.rand(3, 3, local.preprocess.height, local.preprocess.width)
    theirs = AutoModelForImageClassification.from_pretrained(REPO, cache_dir=constants.HF_HUB_CACHE)
    with torch.no_grad():
        wanted = local.model(pixels).logits
        assert torch.equal(back.model(pixels).logits, wanted)
        assert torch.equal(theirs(pixels).logits, wanted)
    assert (back.labels, back.preprocess) == (local.labels, local.preprocess)
    words = ["eval", REPO, "--dataset", "digits", "--max-eval-samples", "40", "--json"]
    there, here = (CliRunner().invoke(app, [words[0], name, *words[2:]]) for name in (REPO, str(run)))
    assert there.exit_code == 0, there.output
    assert json.loads(there.stdout)["count"] == json.loads(here.stdout)["count"] == 40
    shutil.copytree(hub.root / "models" / REPO, run.parent / "again")
    assert read_card(run.parent / "again") is not None  # and its checksums are those of its files
    assert load_model(run.parent / "again").labels == local.labels


def test_nothing_private_is_uploaded(hub: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither home and user, nor host, nor token: also where the run's own settings have them."""
    monkeypatch.setenv("HOME", str(run.parents[2]))
    monkeypatch.setenv("USER", "grace-hopper")
    card = read_card(run / "best")
    assert card is not None
    data, model = str(run.parents[1] / "photos"), str(run.parents[1] / "models" / "vit-of-mine")
    config = card.config.model_copy(update={"dataset": data, "model": model, "exclude": data + "/bad.txt"})
    loaded = load_model(run)
    shutil.rmtree(run / "best")
    save_model(run / "best", loaded.model, loaded.preprocess, dataclasses.replace(card, config=config))
    push(run, REPO)
    everything = b"\0".join(files(hub).values()) + "".join(message for _, message in hub.commits).encode()
    for private in ("grace-hopper", str(run.parents[2]), socket.gethostname(), TOKEN, getpass.getuser() + "/"):
        assert private.encode() not in everything, private
    assert b"vit-of-mine" in everything


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        (TOKEN, "the value of HF_TOKEN"),
        ("hf_" + "x1Y2" * 8, "a hub token"),
        ("hunter2hunter2", "the value of MY_PASSWORD"),
        ("~/photos", "your home folder"),
    ],
)
def test_a_secret_in_a_file_stops_it(
    hub: StandInHub, run: Path, secret: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "hunter2hunter2")
    monkeypatch.setenv("HOME", str(run.parents[2]))
    loaded, card = load_model(run), read_card(run / "best")
    assert card is not None
    loaded.model.config.comment = secret.replace("~", str(run.parents[2]))
    shutil.rmtree(run / "best")
    save_model(run / "best", loaded.model, loaded.preprocess, card)
    with pytest.raises(UsageError, match=f"config.json contains {said}, so nothing was uploaded"):
        push(run, REPO)
    assert hub.requests == []


def test_the_card_has_what_the_hub_reads(digits_run: Any) -> None:
    card = read_card(digits_run.checkpoint)
    assert card is not None
    known = dataclasses.replace(
        card, config=card.config.model_copy(update={"dataset": "cifar10", "model": "google/vit", "from_scratch": False})
    )
    page = readme(known, REPO, "mit")
    parsed = hf.ModelCard(page, ignore_metadata_errors=False)
    data = parsed.data.to_dict()
    assert (data["license"], data["base_model"], data["datasets"]) == ("mit", "google/vit", ["uoft-cs/cifar10"])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "image-classification")
    assert "vitft" in data["tags"]
    results = {(one.dataset_split, one.metric_type): one for one in parsed.data.eval_results}
    assert {split for split, _ in results} == {"validation", "test"}
    for (split, kind), one in results.items():
        score = card.scores[split]
        assert one.metric_value == pytest.approx(score["accuracy" if kind == "accuracy" else "macro_f1"], abs=1e-6)
        assert one.dataset_args == {"images": score["count"], "hash": score["split_hash"]}
        assert f"{score['count']} {split} images" in one.metric_name
    assert f'model="{REPO}"' in page
    local = yaml.safe_load((digits_run.checkpoint / "README.md").read_text().split("---\n")[1])
    assert not {"license", "base_model", "datasets"} & local.keys()  # digits and vit-micro are none of the hub's


def test_a_dry_run_asks_nobody(hub: StandInHub, run: Path) -> None:
    done = CliRunner().invoke(app, ["push", str(run), REPO, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert re.search(r"model\.safetensors +[\d.]+ [kM]B", done.stdout)
    assert "model-index:" in done.stdout
    assert hub.requests == []
    told = json.loads(CliRunner().invoke(app, ["push", str(run), REPO, "--dry-run", "--json"]).stdout)
    assert told["files"]["model.safetensors"] == (run / "best" / "model.safetensors").stat().st_size
    assert (told["url"], told["commit"]) == (None, None)


def test_files_of_others_stay_and_what_is_unchanged_is_not_sent_again(hub: StandInHub, run: Path) -> None:
    folder = hub.root / "models" / REPO
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("mine too")
    done = push(run, REPO, message="Better")
    assert done.replaced == ("README.md",)
    assert files(hub)["notes.txt"] == b"mine too"
    assert hub.commits == [(f"{REPO}@main", "Better")]
    uploads = sum(request.startswith("PUT") for request in hub.requests)
    assert uploads == 2  # weights and novelty
    push(run, REPO)
    assert len(hub.commits) == 1
    assert sum(request.startswith("PUT") for request in hub.requests) == uploads


def test_a_branch_and_a_private_repository(hub: StandInHub, run: Path) -> None:
    push(run, REPO, private=True, revision="trial")
    assert hub.private == {REPO}
    assert files(hub) == {}
    assert "model.safetensors" in files(hub, branch="trial")
    hub.private.clear()
    with pytest.raises(UsageError, match="exists, and is public"):
        push(run, REPO, private=True)


def test_an_adapter_goes_with_it(hub: StandInHub, run: Path) -> None:
    adapter = run / "best" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "vit-micro"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (run / "best" / "state.json").write_text("{}")
    push(run, REPO)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} < files(hub).keys()
    assert "state.json" not in files(hub)


def test_peft_reads_a_pushed_adapter_back(hub: StandInHub, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from tests.training.test_lora_runs import adapted, start

    run = train(adapted(start(tmp_path / "model"), max_steps=4), output=tmp_path / "run").run
    push(run, REPO)
    base = AutoModelForImageClassification.from_pretrained(run / "base")
    pixels = torch.rand(2, 3, 28, 28)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = hf.hf_hub_download(REPO, f"adapter/{name}", cache_dir=constants.HF_HUB_CACHE)
    with torch.no_grad():
        before = base(pixels).logits
        theirs = peft.PeftModel.from_pretrained(base, Path(file).parent).eval()
        found, merged = theirs(pixel_values=pixels).logits, load_model(REPO).model(pixels).logits
    assert (found - merged).abs().max() < 1e-4 < (merged - before).abs().max()


def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def _down(monkeypatch: pytest.MonkeyPatch) -> None:
    with StandInHub(Path()) as gone:
        monkeypatch.setattr(constants, "ENDPOINT", gone.url)


@pytest.mark.parametrize(
    ("repo", "change", "said"),
    [
        (REPO, lambda m: m.delenv("HF_TOKEN"), "not logged in at the hub; run `hf auth login`"),
        (REPO, lambda m: m.setenv("HF_TOKEN", "hf_" + "w" * 30), "does not know your token"),
        ("grace/digits", lambda m: None, "you have no right to write there"),
        (REPO, _offline, "HF_HUB_OFFLINE is set"),
        (REPO, _down, "could not be reached"),
        ("digits", lambda m: None, "give owner/name"),
        ("a/b c", lambda m: None, "no hub id"),
    ],
)
def test_what_is_wrong_is_a_line(
    hub: StandInHub, run: Path, repo: str, change: Callable[[Any], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    done = CliRunner().invoke(app, ["push", str(run), repo])
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert hub.commits == []


def test_only_checkpoints_of_runs_are_pushed(hub: StandInHub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no run and no checkpoint of one"):
        push(tmp_path, REPO)


def test_an_exported_file_is_not_pushed(hub: StandInHub, run: Path, tmp_path: Path) -> None:
    """The hub is read by Transformers."""
    card = read_card(run / "best")
    assert card is not None
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.onnx").touch()
    write_card(tmp_path / "exported", card, text="")
    for name in ("exported", "exported/model.onnx"):
        with pytest.raises(UsageError, match=r"is exported.*push the run it came from"):
            push(tmp_path / name, REPO, dry_run=True)


def test_a_connection_lost_on_the_way_is_a_line(hub: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(hf.HfApi, "create_commit", lost)
    with pytest.raises(UsageError, match="could not be reached; try again, and what has arrived is not sent twice"):
        push(run, REPO, revision="trial")  # the branch is there already


def test_a_damaged_checkpoint_is_not_pushed(hub: StandInHub, run: Path) -> None:
    weights = run / "best" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match="does not match its SHA-256"):
        push(run, REPO)
    assert hub.requests == []
