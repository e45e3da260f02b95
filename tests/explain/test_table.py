"""The stage table on the screen and as JSON, and where its sizes come from."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vitft.cli.app import app
from vitft.errors import ModelError, UsageError
from vitft.explain.table import document, resolve_spec, stage_table
from vitft.explain.tour import tour
from vitft.spec import PRESETS, ViTSpec, preset, stages, total, training_flops


def render(spec: ViTSpec, batch_size: int = 1, width: int = 80, **options: bool) -> str:
    screen = Console(width=width, file=StringIO(), color_system=None)
    screen.print(stage_table(spec, batch_size, **options))
    return screen.file.getvalue()  # type: ignore[attr-defined]


def row(text: str, name: str) -> str:
    """The line of the table that starts with a name, with single spaces between columns."""
    return next(" ".join(line.split()) for line in text.splitlines() if line.split()[:1] == name.split()[:1])


def test_the_table_of_a_small_model() -> None:
    text = render(PRESETS["vit-micro"])

    assert row(text, "image") == "image 1×3×28×28 1×3×28×28 · · 9.4 kB"
    assert row(text, "embed.projection") == "embed.projection 1×3×28×28 1×64×7×7 3.1 k 301.1 k ·"
    assert row(text, "attention.scores") == "attention.scores 1×3×4×50×16 1×4×50×50 · 320.0 k ·"
    assert row(text, "mlp.activation") == "mlp.activation 1×50×256 1×50×256 · · 51.2 kB"
    assert row(text, "head") == "head 1×64 1×10 650 1.3 k ·"
    assert row(text, "total") == "total 1×3×28×28 1×10 207.1 k 22.5 M 1.0 MB"


def test_the_summary_and_the_legend() -> None:
    words = " ".join(render(PRESETS["vit-base"]).split())

    assert words.startswith(
        "224×224 pixels → 196 patches of 16×16 → 197 tokens of 768 numbers with the class token → 12 blocks "
        "of attention (tokens look at each other) and MLP (each token on its own) → the class token → 1000 logits"
    )
    assert "for 1 image." in words
    assert "a training step takes 105.4 G." in words


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("batch_size", [1, 32])
def test_all_columns_fit_in_80_characters(name: str, batch_size: int) -> None:
    spec, wide = PRESETS[name], render(PRESETS[name], batch_size, width=200)
    narrow = render(spec, batch_size)

    assert max(len(line) for line in narrow.splitlines()) <= 80
    assert "…" not in narrow
    for stage in stages(replace(spec, layers=1)):
        name = stage.name.removeprefix("block.1.")
        assert row(narrow, name) == row(wide, name)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (120, ["stage", "shape in", "shape out", "params", "FLOPs", "saved"]),
        (60, ["stage", "shape out", "params", "FLOPs"]),
        (40, ["stage", "shape out"]),
    ],
)
def test_a_narrow_terminal_drops_whole_columns(name: str, width: int, columns: list[str]) -> None:
    spec, text = PRESETS[name], render(PRESETS[name], width=width)
    lines, wide = text.splitlines(), render(PRESETS[name], width=200)

    assert max(len(line) for line in lines) <= width
    assert "…" not in text
    assert re.split(r"  +", next(line.strip() for line in lines if line.startswith("stage"))) == columns
    for stage in stages(replace(spec, layers=1)):
        short = stage.name.removeprefix("block.1.")
        cells = dict(zip(["stage", "shape in", "shape out"], row(wide, short).split()[:3], strict=True))
        assert row(text, short).split()[: min(len(columns), 2)] == [cells[column] for column in columns[:2]]
    sums = row(wide, "total").split()
    legend = " ".join(text.split("Shapes and costs")[1].split())
    # The legend names dropped columns, with their totals.
    assert ("lack of width: shape in, saved" in legend) == (width < 80)
    assert (f"saved (total {' '.join(sums[-2:])})" in legend) == (width < 80)
    assert (f"params (total {' '.join(sums[3:5])})" in legend) == (width < 60)


def test_equal_blocks_are_summed_in_one_row() -> None:
    spec = PRESETS["vit-micro"]
    text = render(spec)

    assert row(text, "block") == "block 1"
    # 3 x 49,984 parameters, 3 x 5,555,200 FLOPs, 3 x 244,800 bytes.
    assert row(text, "blocks") == "blocks 2-4 as block 1 150.0 k 16.7 M 734.4 kB"
    assert text.count("attention.scores") == 1
    assert "block 2 " in render(replace(spec, layers=2))
    assert "as block 1" not in render(replace(spec, layers=1))


def test_all_blocks_are_shown_on_request() -> None:
    text = render(PRESETS["vit-micro"], all_blocks=True)

    assert text.count("attention.scores") == 4
    assert "as block 1" not in text
    assert "block 4 " in text
    assert row(text, "total") == row(render(PRESETS["vit-micro"]), "total")


def test_shapes_for_an_image_size_and_a_pre_logits_layer() -> None:
    spec = resolve_spec(
        image_size=512, patch_size=16, width=768, layers=6, heads=6, mlp=3072, pre_logits=2000, classes=1000
    )
    table = document(spec)
    shapes = {stage["name"]: stage["output"] for stage in table["stages"]}
    names = ("image", "embed.projection", "embed.patches", "embed.positions", "pool", "pre_logits", "head")

    assert [shapes[name] for name in names] == [
        [1, 3, 512, 512],
        [1, 768, 32, 32],
        [1, 1024, 768],
        [1, 1025, 768],
        [1, 768],
        [1, 2000],
        [1, 1000],
    ]
    assert "1×3×6×1025×128" in render(spec)


def test_the_document_is_json_and_complete() -> None:
    spec = PRESETS["vit-micro"]
    table = document(spec, 4)

    assert json.loads(json.dumps(table)) == table
    assert list(table) == ["spec", "stages", "total"]
    assert ViTSpec(**table["spec"]) == spec
    assert [stage["name"] for stage in table["stages"]] == [stage.name for stage in stages(spec)]
    for stage in table["stages"]:
        assert list(stage) == ["name", "input", "output", "parameters", "flops", "activation_bytes"]
    sums = total(spec, 4)
    assert table["total"] == {
        "parameters": sums.parameters,
        "flops": sums.flops,
        "activation_bytes": sums.activation_bytes,
    }
    assert training_flops(spec, 4) == 3 * table["total"]["flops"]


def test_sizes_replace_those_of_the_model() -> None:
    assert resolve_spec() == preset("vit-base-patch16-224")
    assert resolve_spec("vit-tiny") == preset("vit-tiny")
    assert resolve_spec("vit-base", patch_size=32) == preset("vit-base-patch32-224")
    small = resolve_spec("vit-micro", image_size=32, width=96, layers=2, heads=3, mlp=100, classes=7)
    assert small == ViTSpec.square(32, 4, 96, 2, 3, 100, 7)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 225}, "--image-size 225 is not a multiple of patch_size 16; try --image-size 224 or 240."),
        ({"patch_size": 15}, "image_size 224 is not a multiple of --patch-size 15; try --patch-size 14 or 16."),
        (
            {"image_size": 230, "patch_size": 16},
            "--image-size 230 is not a multiple of --patch-size 16; "
            "try --image-size 224 or 240, or --patch-size 10 or 23.",
        ),
        ({"image_size": 3}, "--image-size 3 is not a multiple of patch_size 16; try --image-size 16."),
        ({"heads": 7}, "width 768 is not a multiple of --heads 7; try --heads 6 or 8."),
        ({"heads": 10**9}, "width 768 is not a multiple of --heads 1000000000; try --heads 768."),
        (
            {"width": 770, "heads": 12},
            "--width 770 is not a multiple of --heads 12; try --width 768 or 780, or --heads 11 or 14.",
        ),
        ({"width": 0}, "--width must be an integer of at least 1, got 0; try --width 12."),
        ({"classes": 0}, "--classes must be an integer of at least 1, got 0; try --classes 1."),
        ({"patch_size": 0}, "--patch-size must be an integer of at least 1, got 0; try --patch-size 1."),
        ({"pre_logits": -3}, "--pre-logits must be an integer of at least 1, got -3; try --pre-logits 1."),
        # One error at a time: that of the heads comes next.
        (
            {"image_size": 225, "heads": 7},
            "--image-size 225 is not a multiple of patch_size 16; try --image-size 224 or 240.",
        ),
    ],
)
def test_inconsistent_sizes_are_reported_as_flags_with_values_that_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolve_spec(**sizes)  # type: ignore[arg-type]

    assert str(refused.value) == message
    for flag, *values in re.findall(r"--([\w-]+) (\d+)(?: or (\d+))?", message.split("; try ")[1]):
        for value in filter(None, values):
            try:
                resolve_spec(**(sizes | {flag.replace("-", "_"): int(value)}))  # type: ignore[arg-type]
            except UsageError as next_error:
                assert f"--{flag}" not in str(next_error)  # noqa: PT017  (the remaining error is another one)


def test_a_local_folder_needs_no_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit", "image_size": 384, "num_labels": 5}')

    assert resolve_spec(str(tmp_path), layers=3) == ViTSpec.square(384, 16, 768, 3, 12, 3072, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is unreadable"),
        (b"\xff\xfe\x00", "is unreadable"),
        (b"[" * 100_000, "is unreadable"),
        (b"[]", "is not a JSON object"),
        (
            b'{"model_type": "vit", "num_hidden_layers": 1000000000}',
            "layers 1,000,000,000 is more than 1,000; try",
        ),
        (b'{"model_type": "vit", "num_labels": 1000000000}', "classes 1,000,000,000 is more than 1,000,000"),
        (b'{"model_type": "vit", "layer_norm_eps": "x"}', "norm_eps must be at least 0, got 'x'"),
        (b'{"model_type": "vit", "layer_norm_eps": null}', "norm_eps must be at least 0, got None"),
        (b'{"model_type": "vit", "id2label": 5}', "id2label must be a name for each class, got 5"),
        (b'{"model_type": "swin"}', "no stage table for this architecture: swin"),
        (None, "no config.json in .*; give a Transformers model folder"),
    ],
)
def test_a_folder_without_a_usable_config_is_a_model_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(ModelError, match=message) as refused:
        resolve_spec(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_run_folder_suggests_the_model_inside(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")

    with pytest.raises(ModelError, match=r"; try /.*/best\.$"):
        resolve_spec(str(tmp_path))


def test_a_mistyped_name_or_folder_does_not_ask_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("try_to_load_from_cache", "get_hf_file_metadata", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{function}", lambda *_: pytest.fail("asked the hub"))

    with pytest.raises(UsageError, match=r"did you mean vit-base\? You can also give a local folder or a hub id"):
        resolve_spec("vit-bse")
    for folder in ("./absent", "/absent/model", "~/absent", "a/b/c"):
        with pytest.raises(ModelError, match=f"no folder {folder}"):
            resolve_spec(folder)


def test_only_the_config_of_a_hub_model_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deit"}')
    downloads: list[Any] = []

    def download(*arguments: str) -> str:
        downloads.append(arguments)
        return str(tmp_path / "config.json")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    assert resolve_spec("owner/name").prefix_tokens == 2
    assert downloads == [("owner/name", "config.json")]


def test_a_cached_config_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit", "patch_size": 32}')
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _: pytest.fail("asked the hub"))

    assert resolve_spec("owner/name").patches == 49


def test_an_unreachable_hub_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    code = (
        "from vitft.errors import ModelError\nfrom vitft.explain.table import resolve_spec\n"
        "try: resolve_spec('owner/name')\nexcept ModelError as error: print(error)"
    )
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "https://huggingface.co",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | settings
    )

    assert result.stdout == (
        "config.json of owner/name is not in ~/cache and cannot be downloaded from https://huggingface.co "
        "(OfflineModeIsEnabled); offline, give a local folder or a preset such as vit-base-patch16-224.\n"
    )


def test_presets_and_sizes_need_no_heavy_import() -> None:
    code = (
        "import sys; from vitft.explain.table import *; stage_table(resolve_spec('vit-large')); "
        "document(resolve_spec(image_size=512, layers=6)); print(sorted(set(sys.modules) & "
        "{'torch', 'transformers', 'datasets', 'numpy', 'huggingface_hub', 'pydantic'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout == "[]\n"


def test_without_options_there_is_a_tour() -> None:
    text = " ".join(CliRunner().invoke(app, ["explain"]).stdout.split())
    assert text.startswith("How a Vision Transformer turns an image into an answer 1 cut An image has 224×224 pixels")
    # Numbers in the text, computed from the sizes.
    for words in (
        "150,528 numbers", "14×14 patches of 16×16 pixels, 768 numbers each", "the same matrix for all 196",
        "To each of the 197 tokens", "in 12 heads of 64 numbers", "a linear layer to 3072 numbers", "There are 12,",
        "33 % of all weights are in attention, 65 % in the MLPs", "1000 logits",
    ):  # fmt: skip
        assert words in text
    assert "total 1×3×224×224 1×1000" in text
    assert text.endswith("vitft scratch train scalar")


def test_the_tour_names_every_stage_of_the_table() -> None:
    text = " ".join(CliRunner().invoke(app, ["explain"]).stdout.split("Stage by stage")[0].split())
    named = [name for brackets in re.findall(r"\[(.*?)\]", text) for name in brackets.split(", ")]
    for stage in stages(PRESETS["vit-base"]):
        short = re.sub(r"^block\.\d+\.", "", stage.name)
        assert any(short == name or (name.endswith(".*") and short.startswith(name[:-1])) for name in named), short


@pytest.mark.parametrize("option", [["--model", "vit-tiny"], ["--layers", "2"], ["--json"]])
def test_with_a_model_or_sizes_there_is_only_the_table(option: list[str]) -> None:
    assert "How a Vision Transformer" not in CliRunner().invoke(app, ["explain", *option]).stdout


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_tour_fits_the_width(width: int) -> None:
    screen = Console(width=width, file=StringIO(), color_system=None)
    screen.print(tour(PRESETS["vit-huge"]))
    assert max(map(len, screen.file.getvalue().splitlines())) <= min(width, 110)  # type: ignore[attr-defined]
