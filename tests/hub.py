"""A stand-in for the Hugging Face hub on loopback, and a tiny model and dataset to serve from it.

It answers the REST paths that huggingface_hub, datasets and transformers ask for when they load a model
or a dataset, so that a test runs the real loading code with no network:

    GET       /api/{models,datasets}/ID[/revision/REV]         commit, files
    GET       /api/{models,datasets}/ID/tree/REV[/FOLDER]      entries of a folder, ?recursive
    POST      /api/{models,datasets}/ID/paths-info/REV         entries of the named paths
    GET HEAD  [/datasets]/ID/resolve/REV/FILE                  bytes, with ETag and X-Repo-Commit

and, for models, what it takes to upload one, with the token `TOKEN`, in a namespace of `owners`:

    POST      /api/repos/create, /api/validate-yaml            a repository; the header of a model card
    POST      /api/models/ID/branch/REV                        a branch, which begins empty
    POST      /api/models/ID/preupload/REV                     which files are large, and what is there
    POST PUT  /ID.git/info/lfs/objects/batch, /lfs/OID         the large ones
    POST      /api/models/ID/commit/REV                        the others, and the names of all
"""

import base64
import json
import re
from collections.abc import Iterator
from hashlib import sha1, sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from tests.web import Loopback

MODEL = "google/vit-base-patch16-224-in21k"
DATASET = "uoft-cs/cifar10"
TOKEN = "hf_" + "Stand" * 6
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class _Handler(BaseHTTPRequestHandler):
    """One request, answered from the folders of `hub`."""

    site: "StandInHub"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        self.site.requests.append(f"{self.command} {self.path}")
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query, keep_blank_values=True)
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            self._refuse(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")
        elif self.command in ("POST", "PUT") and "paths-info" not in path:
            self._write(path, body)
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            kind, name, revision = found.groups()
            if self._known(kind, name, revision):
                self._json(self._description(kind, name))
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            kind, name, revision, inside = found.groups()
            if self._known(kind, name, revision, inside):
                recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                self._json(self._tree(self._folder(kind, name, revision), inside or "", recursive))
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            kind, name, revision = found.groups()
            if self._known(kind, name, revision):
                folder = self.site.root / kind / name
                asked = _asked_paths(body, self.headers.get("Content-Type", ""))
                self._json([_entry(folder, folder / p) for p in asked if (folder / p).exists()])
        elif found := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = found.groups(default="models")
            if self._known(kind, name, revision, file):
                self._file(kind, name, file)
        else:
            self._missing("RepoNotFound", "Repository not found")

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _write(self, path: str, body: bytes) -> None:
        """Answer what an upload asks for."""
        hub = self.site
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] not in hub.owners:
                return self._refuse(HTTPStatus.FORBIDDEN, "You don't have the rights to create a model under this name")
            (hub.root / "models" / name).mkdir(parents=True)
            hub.private |= {name} if asked.get("private") or asked.get("visibility") == "private" else set()
            self._json({"url": f"{hub.url}/{name}"})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path):
            name, what, branch = found.groups()
            if name.split("/")[0] not in hub.owners:
                return self._refuse(HTTPStatus.FORBIDDEN, "Forbidden: you need write access")
            folder = self._folder("models", name, branch)
            if what == "branch":
                folder.mkdir(parents=True)
                self._json({})
            elif what == "preupload":
                self._json({"files": [_upload_mode(folder, file["path"]) for file in json.loads(body)["files"]]})
            else:
                self._commit(name, branch, folder, [json.loads(line) for line in body.splitlines()])
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in hub.large:
                    one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
            self._json({"transfer": "basic", "objects": objects})
        else:
            oid = path.removeprefix("/lfs/")
            assert sha256(body).hexdigest() == oid
            hub.large[oid] = body
            self._json({})
        return None

    def _commit(self, name: str, branch: str, folder: Path, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.site.commits.append((f"{name}@{branch}", value["summary"]))
                continue
            assert line["key"] in ("file", "lfsFile"), line["key"]  # nothing is deleted
            file = folder / value["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            content = base64.b64decode(value["content"]) if line["key"] == "file" else self.site.large[value["oid"]]
            file.write_bytes(content)
        self._json(
            {
                "commitUrl": f"{self.site.url}/{name}/commit/x",
                "commitOid": self.site.sha("models", name),
            }
        )

    def _folder(self, kind: str, name: str, revision: str) -> Path:
        """Where the files of a revision are."""
        folder = self.site.root / kind / name
        known = revision == "main" or (folder.is_dir() and revision == self.site.sha(kind, name))
        return folder if known else self.site.root / "branches" / kind / name / revision

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        self._answer(status, json.dumps({"error": message}).encode(), headers)

    def log_message(self, *_: object) -> None:
        """Say nothing on standard error."""

    def _known(self, kind: str, name: str, revision: str | None, inside: str | None = None) -> bool:
        """Whether this exists here; if not, answer so."""
        folder = self.site.root / kind / name
        if not folder.is_dir():
            self._missing("RepoNotFound", "Repository not found")
        elif revision is not None and not self._folder(kind, name, revision).is_dir():
            self._missing("RevisionNotFound", f"Invalid rev id: {revision}")
        elif inside and not (folder / inside).exists():
            self._missing("EntryNotFound", "Entry not found", self.site.sha(kind, name))
        else:
            return True
        return False

    def _description(self, kind: str, name: str) -> dict[str, Any]:
        folder = self.site.root / kind / name
        siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in _files(folder)]
        described = {"_id": "0" * 24, "id": name, "sha": self.site.sha(kind, name), "siblings": siblings}
        private = name in self.site.private
        return described | {"private": private, "gated": False, "disabled": False, "tags": [], "downloads": 0}

    def _tree(self, folder: Path, inside: str, recursive: bool) -> list[dict[str, Any]]:
        paths = (folder / inside).rglob("*") if recursive else (folder / inside).iterdir()
        return [_entry(folder, path) for path in sorted(paths)]

    def _file(self, kind: str, name: str, file: str) -> None:
        content = (self.site.root / kind / name / file).read_bytes()
        headers = {"ETag": f'"{sha256(content).hexdigest()}"', "X-Repo-Commit": self.site.sha(kind, name)}
        headers |= {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._answer(HTTPStatus.OK, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._answer(HTTPStatus.PARTIAL_CONTENT, content[first : last + 1], headers)

    def _json(self, document: Any) -> None:
        self._answer(HTTPStatus.OK, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str, message: str, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        headers |= {"X-Repo-Commit": commit} if commit else {}
        self._answer(HTTPStatus.NOT_FOUND, json.dumps({"error": message}).encode(), headers)

    def _answer(self, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class StandInHub(Loopback):
    """Serves the repositories root/models/ORG/NAME and root/datasets/ORG/NAME.

    A repository has one commit, the hash of its contents, which `main` names too. `requests` lists
    what was asked for, as `GET /path`.
    """

    handler = _Handler

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        self.owners: set[str] = set()  # where TOKEN may write
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}  # uploaded, by SHA-256
        self.commits: list[tuple[str, str]] = []  # repository and branch, and message

    def sha(self, kind: str, name: str) -> str:
        """The commit of a repository; kind is `models` or `datasets`."""
        folder = self.root / kind / name
        contents = [path.relative_to(folder).as_posix().encode() + path.read_bytes() for path in _files(folder)]
        return sha1(b"\0".join(contents)).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    content = path.read_bytes()
    return {"type": "file", "oid": sha1(content).hexdigest(), "size": len(content), "path": name}


def _upload_mode(folder: Path, name: str) -> dict[str, Any]:
    """Whether a file is to be uploaded as a large one, and the hash of the one that is there."""
    large, file = name.endswith(".safetensors"), folder / name
    answer = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    if not file.is_file():
        return answer
    content = file.read_bytes()
    git = sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return answer | {"oid": sha256(content).hexdigest() if large else git}


def _asked_paths(body: bytes, content_type: str) -> list[str]:
    asked = json.loads(body) if "json" in content_type else parse_qs(body.decode())
    paths = asked.get("paths", [])
    return paths if isinstance(paths, list) else [paths]


def make_model(folder: Path) -> None:
    """A tiny random ViT without a head, stored as google/vit-base-patch16-224-in21k is."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(image_size=32, patch_size=16, **sizes)).save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    document = {"do_normalize": True, "do_resize": True, "image_mean": half, "image_std": half}
    document |= {"size": 32, "resample": 2}  # An int, as in the days of ViTFeatureExtractor.
    (folder / "preprocessor_config.json").write_text(json.dumps(document))


def make_dataset(folder: Path) -> None:
    """40 training and 20 test images with the columns, names and files of uoft-cs/cifar10."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn
    from PIL import Image

    random = np.random.default_rng(0)
    features = Features({"img": ImageColumn(), "label": ClassLabel(names=list(CIFAR10))})
    (folder / "plain_text").mkdir(parents=True)
    sizes = []
    for split, count in (("train", 40), ("test", 20)):
        rows: dict[str, list[Any]] = {"img": [], "label": []}
        for i in range(count):
            pixels = random.integers(0, 256, (32, 32, 3)) // 4 + 18 * (i % 10)  # A class has its brightness.
            png = BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(png, "png")
            rows["img"].append({"bytes": png.getvalue(), "path": None})
            rows["label"].append(i % 10)
        file = folder / "plain_text" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(rows, features=features).to_parquet(file)
        sizes.append(file.stat().st_size)
    names = "\n".join(f"          '{i}': {name}" for i, name in enumerate(CIFAR10))
    (folder / "README.md").write_text(_CARD.format(names=names, sizes=sizes, total=sum(sizes)))


_CARD = """---
task_categories:
- image-classification
pretty_name: Cifar10
dataset_info:
  config_name: plain_text
  features:
  - name: img
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
{names}
  splits:
  - name: train
    num_bytes: {sizes[0]}
    num_examples: 40
  - name: test
    num_bytes: {sizes[1]}
    num_examples: 20
  download_size: {total}
  dataset_size: {total}
configs:
- config_name: plain_text
  data_files:
  - split: train
    path: plain_text/train-*
  - split: test
    path: plain_text/test-*
  default: true
---
# A stand-in for CIFAR-10
"""
