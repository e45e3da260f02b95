"""What is chosen before a run: attention, the micro-batch that fits, compiling; and what a trial of it measures."""

import copy
import json
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image

import vitft.training.step
from vitft import TrainConfig, train
from vitft.data.augment import CROP_AREA
from vitft.data.stores import store
from vitft.errors import UsageError
from vitft.hardware.device import micro_batch
from vitft.models.load import compiled, shape_of
from vitft.spec import peak_activation_bytes
from vitft.training import trainer
from vitft.training.cost import autotune, estimate
from vitft.training.optim import make_optimizer
from vitft.training.setup import Prepared, prepare
from vitft.training.step import Learner


def config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "dataset": "digits", "model": "vit-micro", "from_scratch": True, "image_size": 28, "width": 16, "heads": 2,
        "mlp": 32, "layers": 2, "max_train_samples": 40, "val_fraction": 0, "max_eval_samples": 20, "batch_size": 16,
        "epochs": 1, "device": "cpu", "precision": "fp32", "lr": 1e-3,
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


@pytest.fixture
def prepared() -> Prepared:
    return prepare(config())


# -- threads --------------------------------------------------------------------------------------


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(autotune, "cpus", lambda: 4)
    now = [4]
    monkeypatch.setattr(torch, "set_num_threads", lambda count: now.__setitem__(0, count))
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 1.0, 2: 0.95, 4: 0.3}, 1),  # two are not worth it: four are not tried
        ({1: 1.0, 2: 0.6, 4: 0.58}, 2),
        ({1: 1.0, 2: 0.6, 4: 0.35}, 4),
        ({1: 1.0, 2: 25.0, 4: 90.0}, 1),  # another program holds a CPU
    ],
)
def test_threads_of_a_small_model_are_chosen_by_a_trial(
    seconds: dict[int, float], chosen: int, prepared: Prepared, four_cpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "pass_s", lambda prepared, images: seconds[torch.get_num_threads()])
    assert autotune.autotuned(prepared).config.threads == chosen
    assert torch.get_num_threads() == 4


def test_a_large_model_gets_all_threads_untried(
    prepared: Prepared, four_cpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "_LARGE_FLOPS", 1.0)
    monkeypatch.setattr(autotune, "pass_s", lambda *given: pytest.fail("tried"))
    assert autotune.autotuned(prepared).config.threads == 4


def test_threads_that_the_environment_sets_stand(
    prepared: Prepared, four_cpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    monkeypatch.setattr(autotune, "pass_s", lambda *given: pytest.fail("tried"))
    assert autotune.autotuned(prepared).config.threads == 3


def test_a_run_trains_evaluates_and_resumes_with_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    step = Learner.step
    monkeypatch.setattr(
        Learner, "step", lambda self, number: seen.append(torch.get_num_threads()) or step(self, number)
    )
    before = torch.get_num_threads()
    train(config(threads=before + 1, max_steps=1), output=tmp_path / "run")
    assert seen == [before + 1]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["threads"] == before + 1
    assert torch.get_num_threads() == before  # the program's own are as they were


# -- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["eager", "sdpa"])
def test_the_model_has_the_attention_that_was_asked_for(wanted: str) -> None:
    found = prepare(config(attention=wanted))
    assert found.config.attention == wanted
    assert found.loaded.model.config._attn_implementation == wanted


def test_both_attentions_train_alike(tmp_path: Path) -> None:
    runs = [train(config(attention=wanted), output=tmp_path / wanted) for wanted in ("eager", "sdpa")]
    one, other = (transformers.ViTForImageClassification.from_pretrained(run.checkpoint) for run in runs)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        if not name.endswith("key.bias"):  # softmax does not see it: its gradient is rounding, and Adam magnifies it
            assert torch.allclose(a, b, atol=2e-5), name


@pytest.mark.parametrize("kind", ["Swinv2", "ConvNext"])
def test_a_model_without_an_attention_says_so(tmp_path: Path, kind: str) -> None:
    sizes: dict[str, Any] = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 32}
    if kind == "Swinv2":  # asked for what it has not, Transformers leaves it as it is
        sizes = {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": 4,
        }
    model = getattr(transformers, f"{kind}ForImageClassification")(getattr(transformers, f"{kind}Config")(**sizes))
    model.save_pretrained(tmp_path)
    given = {"model": str(tmp_path), "from_scratch": False, "width": None, "heads": None, "mlp": None, "layers": None}
    assert prepare(config(image_size=32, **given)).config.attention == "eager"  # auto: what the architecture has
    with pytest.raises(UsageError, match=rf"^attention sdpa: a {kind.lower()} model has none; use auto\.$"):
        prepare(config(image_size=32, attention="sdpa", **given))


# -- the micro-batch ------------------------------------------------------------------------------


def test_the_micro_batch_is_the_largest_half_that_fits(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepared.with_settings(micro_batch_size="auto", batch_size=30)
    monkeypatch.setattr(autotune, "_fits_in_memory", lambda prepared, micro: micro <= 8)
    assert autotune.autotuned(prepared).config.micro_batch_size == 8  # 30, 15, 8
    assert autotune.autotuned(prepared, processes=2).config.micro_batch_size == 8  # 15, 8
    assert autotune.autotuned(prepared, processes=4).config.micro_batch_size is None  # a share of 8 fits whole
    monkeypatch.setattr(autotune, "_fits_in_memory", lambda prepared, micro: False)
    assert autotune.autotuned(prepared).config.micro_batch_size == 1


def test_what_fits_follows_the_free_memory(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = estimate.memory_bytes(prepared, 16)
    assert extra is not None
    needed = extra - autotune.psutil.Process().memory_info().rss

    def free(available: float) -> bool:
        monkeypatch.setattr(autotune.psutil, "virtual_memory", lambda: type("", (), {"available": available}))
        return autotune._fits_in_memory(prepared, 16)

    assert free(1.25 * needed + 50e6)
    assert not free(1.1 * needed)  # a run holds more than training needs
    assert not free(0)


def test_memory_counts_images_as_they_are_stored(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those to be cropped are larger than those to be scored."""
    before = estimate.memory_bytes(prepared, 4)
    assert before is not None
    sides = {None: 100, False: 10}
    monkeypatch.setattr(
        estimate, "stored_image", lambda prepared, crops=None: torch.zeros(sides[crops], 1, 1, dtype=torch.uint8)
    )
    monkeypatch.setattr(estimate, "_saved_bytes", lambda prepared, images: 0)
    monkeypatch.setattr(estimate.psutil.Process, "memory_info", lambda self: type("", (), {"rss": 0}))
    sizes = {}
    for side in (100, 200):
        sides[None] = side
        sizes[side] = estimate.memory_bytes(prepared, 4)
    assert sizes[200] - sizes[100] == 100 * len(prepared.splits["train"].rows)  # type: ignore[operator]


@pytest.mark.parametrize("augment", ["flip", "crop"])
def test_decoding_is_tried_as_the_run_decodes(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, augment: str
) -> None:
    prepared = prepared.with_settings(augment=augment)
    asked: list[bool] = []
    monkeypatch.setattr(estimate, "decode_all", lambda *given, crops, **others: (asked.append(crops) or [], []))
    estimate.decode_image_s(prepared)
    assert asked == [augment == "crop"]


def test_an_automatic_micro_batch_is_written_down_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "_fits_in_memory", lambda prepared, micro: micro <= 4)
    run = train(config(micro_batch_size="auto", max_steps=2, save_every=1), output=tmp_path / "run").run
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert (written["micro_batch_size"], written["compile"]) == (4, "off")
    assert written["attention"] in ("eager", "sdpa")
    monkeypatch.setattr(trainer, "autotuned", lambda *given: pytest.fail("chosen anew"))
    trainer.resume(run)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("x", "--micro-batch-size should be a valid integer or 'auto', got 'x'"),
        ("0", "--micro-batch-size should be greater than 0 or 'auto', got '0'"),
    ],
)
def test_a_micro_batch_is_a_number_or_auto(given: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig.parse({"micro_batch_size": given}, "flags")
    assert str(caught.value) == said
    assert TrainConfig.parse({"micro_batch_size": "12"}, "flags").micro_batch_size == 12
    assert micro_batch(TrainConfig(micro_batch_size="auto", batch_size=9), processes=2) == 5


# -- compiling ------------------------------------------------------------------------------------


def test_a_short_run_is_not_compiled(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "compiled", lambda module: pytest.fail("tried"))
    assert autotune.autotuned(prepared).config.compile == "off"


@pytest.mark.parametrize(("slower", "chosen"), [(0.5, "on"), (0.99, "off"), (2.0, "off")])
def test_a_long_run_is_compiled_where_a_trial_is_faster(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, slower: float, chosen: str
) -> None:
    monkeypatch.setattr(autotune, "first_image_s", lambda prepared: 1e3)
    monkeypatch.setattr(autotune, "cost", lambda prepared, processes: estimate.Cost(1e3, 0.0, 1.0))
    monkeypatch.setattr(autotune, "compiled", lambda module: "fast")
    monkeypatch.setattr(autotune, "pass_s", lambda prepared, images, module: slower if module == "fast" else 1.0)
    assert autotune.autotuned(prepared).config.compile == chosen
    assert autotune.autotuned(prepared, processes=2).config.compile == chosen
    for settings in ({"parallel": "fsdp"}, {"grad_checkpointing": True}):
        for processes in (1, 2):
            assert autotune.autotuned(prepared.with_settings(**settings), processes).config.compile == "off"


@pytest.mark.parametrize(("worth_s", "chosen"), [(40.0, "on"), (40.5, "off")])
def test_a_run_is_as_long_as_its_images_take(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, worth_s: float, chosen: str
) -> None:
    """An epoch of 40 images in batches of 16: the tail of 8 is no whole batch."""
    monkeypatch.setattr(autotune, "_COMPILING_PAYS_S", {"cpu": worth_s})
    monkeypatch.setattr(autotune, "first_image_s", lambda prepared: 1.0)
    monkeypatch.setattr(autotune, "cost", lambda prepared, processes: estimate.Cost(1.0, 0.0, 1.0))
    monkeypatch.setattr(autotune, "compiled", lambda module: "fast")
    tried = []

    def pass_s(prepared: Prepared, images: torch.Tensor, module: Any) -> float:
        tried.append(len(images))
        return 0.5 if module == "fast" else 1.0

    monkeypatch.setattr(autotune, "pass_s", pass_s)
    assert autotune.autotuned(prepared).config.compile == chosen
    assert {*tried} == ({16} if chosen == "on" else set())
    assert autotune.autotuned(prepared, processes=2).config.compile == "off"  # each has half of the images
    monkeypatch.setattr(autotune, "_COMPILING_PAYS_S", {"cpu": worth_s / 2})
    tried.clear()
    assert autotune.autotuned(prepared, processes=2).config.compile == chosen
    assert {*tried} == ({8} if chosen == "on" else set())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("No working C++ compiler found\nand many lines more"), "No working C++ compiler found"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_without_a_compiler_a_long_run_continues_with_one_warning(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def broken(module: Any) -> Any:
        raise error

    monkeypatch.setattr(autotune, "first_image_s", lambda prepared: 1e3)
    monkeypatch.setattr(autotune, "cost", lambda prepared, processes: estimate.Cost(1e3, 0.0, 1.0))
    monkeypatch.setattr(autotune, "compiled", broken)
    assert autotune.autotuned(prepared).config.compile == "off"
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith(f"continues without it: {said}")


@pytest.mark.parametrize(
    ("settings", "processes", "largest"),
    [({"micro_batch_size": "auto"}, 1, 4), ({"micro_batch_size": 8}, 1, 8), ({}, 2, 16), ({}, 1, 32)],
)
def test_no_trial_is_larger_than_the_passes_of_the_run(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], processes: int, largest: int
) -> None:
    tried = []

    def pass_s(prepared: Prepared, images: torch.Tensor, module: Any = None) -> float:
        tried.append(len(images))
        return 0.01

    for module in (autotune, estimate):
        monkeypatch.setattr(module, "pass_s", pass_s)
    monkeypatch.setattr(autotune, "_fitting", lambda prepared, processes: 4)
    monkeypatch.setattr(autotune, "first_image_s", lambda prepared: 1e3)
    monkeypatch.setattr(autotune, "_COMPILING_PAYS_S", {"cpu": 1e-3})
    autotune.autotuned(prepared.with_settings(batch_size=32, threads=1, **settings), processes)
    assert max(tried) == largest


@pytest.mark.parametrize(
    ("how", "grown"), [({}, [1, 4, 16]), ({"enough_s": 0.2}, [1, 4]), ({"enough_s": 9.0}, [1, 4, 16, 32])]
)
def test_a_trial_grows_until_a_pass_takes_long_enough(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, how: dict[str, float], grown: list[int]
) -> None:
    tried = []
    monkeypatch.setattr(estimate, "pass_s", lambda prepared, images: tried.append(len(images)) or 0.06 * len(images))
    assert estimate.cost(prepared.with_settings(batch_size=32), **how).image_s == pytest.approx(0.06)
    assert tried == grown + grown[-1:] * 4


def test_a_trial_that_does_not_fit_stops_growing(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = estimate.pass_s, []

    def pass_s(prepared: Prepared, images: torch.Tensor) -> float:
        tried.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return min(real(prepared, images), 0.01)

    monkeypatch.setattr(estimate, "pass_s", pass_s)
    assert estimate.cost(prepared.with_settings(batch_size=32)).image_s > 0
    assert tried == [1, 4, 16, 4, 4, 4, 4]


def test_what_is_compiled_is_what_is_tried(prepared: Prepared) -> None:
    """A compiled module asks the model for its length when it is taken for a truth value."""
    calls = []
    fast = torch.compile(prepared.loaded.model, backend=lambda graph, inputs: calls.append(1) or graph.forward)
    estimate.pass_s(prepared, estimate.stored_image(prepared)[None], fast)
    assert calls


def test_only_full_micro_batches_are_compiled_and_the_tail_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 images in parts of 8, and of 16 for a step: 8, 8, 8, 8 and 8; with 36 images the last has 4."""
    seen: list[int] = []

    def watched(module: Any) -> Any:
        def fast(pixel_values: torch.Tensor) -> Any:
            seen.append(len(pixel_values))
            return module(pixel_values=pixel_values)

        return fast

    monkeypatch.setattr("vitft.training.step.compiled", watched)
    run = train(config(compile="on", micro_batch_size=8, max_train_samples=36), output=tmp_path / "run").run
    plain = train(config(compile="off", micro_batch_size=8, max_train_samples=36), output=tmp_path / "plain").run
    assert seen == [8, 8, 8, 8]
    same = [(folder / "last/model.safetensors").read_bytes() for folder in (run, plain)]
    assert same[0] == same[1]


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(tmp_path: Path) -> None:
    runs = [train(config(compile=choice), output=tmp_path / choice).run for choice in ("on", "off")]
    losses = [
        [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_torch_compiles_the_forward_pass(prepared: Prepared) -> None:
    model, images = prepared.loaded.model.eval(), torch.randn(4, 3, 28, 28)
    assert torch.allclose(compiled(model)(pixel_values=images).logits, model(pixel_values=images).logits, atol=1e-5)


# -- the trial ------------------------------------------------------------------------------------


def test_decoding_is_tried_with_a_few_images(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which each image takes a quarter of a second."""
    now, real = 0.0, store.decode

    def decode(*given: Any, **settings: Any) -> Any:
        nonlocal now
        now += 0.25
        return real(*given, **settings)

    monkeypatch.setattr(store, "decode", decode)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert estimate.decode_image_s(prepared) == 0.25
    assert now == 0.25 * min(64, len(prepared.splits["train"].rows))


def test_a_batch_keeps_as_much_as_counted_in_full(prepared: Prepared) -> None:
    with estimate.untouched(prepared):
        assert estimate._saved_bytes(prepared, 7) == pytest.approx(estimate._count_saved_bytes(prepared, 7), rel=0.01)


def test_what_was_counted_is_not_kept(prepared: Prepared) -> None:
    made = []

    def remember(module: Any, given: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            made.append(weakref.ref(output))

    with estimate.untouched(prepared) as model:
        hooks = [part.register_forward_hook(remember) for part in model.modules()]
        estimate._count_saved_bytes(prepared, 1)
        for hook in hooks:
            hook.remove()
    assert len(made) > 20
    assert not any(output() is not None for output in made)


@pytest.mark.parametrize(("first_s", "start_s", "largest"), [(0.0625, 7.0, 16), (50.0, 57.0, 1)])
def test_the_cost_of_a_run_counts_its_images_and_its_steps(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, first_s: float, start_s: float, largest: int
) -> None:
    """By a clock that stands still but for the model's forward passes and the optimizer's steps."""
    now, counts = 0.0, list[int]()
    first = {"pass": first_s, "step": 7.0}  # what the first of each takes over the others

    def takes(seconds: float) -> None:
        nonlocal now
        now += seconds

    def seen(module: Any, given: Any, named: dict[str, torch.Tensor]) -> None:
        counts.append(len(named["pixel_values"]))
        takes(counts[-1] / 32 + first.pop("pass", 0.0) if module.training else counts[-1] / 64)

    class Adam(torch.optim.AdamW):
        def step(self, *given: Any, **named: Any) -> Any:
            takes(3.0 + first.pop("step", 0.0))
            return super().step(*given, **named)

    prepared.loaded.model.register_forward_pre_hook(seen, with_kwargs=True)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.optim, "AdamW", Adam)
    before = copy.deepcopy(prepared.loaded.model.state_dict())
    found = estimate.cost(prepared)
    assert found == estimate.Cost(image_s=1 / 32, step_s=3.0, evaluate_image_s=1 / 64, start_s=start_s)
    assert all(torch.equal(weight, before[name]) for name, weight in prepared.loaded.model.state_dict().items())
    assert max(counts) == largest  # a first pass that takes seconds is not tried with more


def test_a_trial_that_fails_leaves_the_model_and_the_generator_as_they_were(prepared: Prepared) -> None:
    model = prepared.loaded.model.eval()
    model.vit.layernorm.train()  # as modules of their own mode are
    model.register_buffer("seen", torch.zeros(1))
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()

    def fail() -> None:
        with estimate.untouched(prepared) as tried:
            estimate.pass_s(prepared, estimate.stored_image(prepared)[None])
            torch.rand(3)
            tried.seen += 1
            assert any(parameter.grad is not None for parameter in tried.parameters())
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert [parameter.grad for parameter in model.parameters()] == [None] * len(list(model.parameters()))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.seen == 0


def test_a_step_begins_without_the_gradients_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = train(config(max_steps=1), output=tmp_path / "clean").run
    made = vitft.training.step.make_optimizer

    def with_gradients(model: Any, settings: TrainConfig) -> Any:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return made(model, settings)

    monkeypatch.setattr(vitft.training.step, "make_optimizer", with_gradients)
    left = train(config(max_steps=1), output=tmp_path / "left").run
    assert (clean / "last/model.safetensors").read_bytes() == (left / "last/model.safetensors").read_bytes()


def test_a_stored_image_is_read_from_its_file(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (9, 7), "red").save(tmp_path / "pets" / name / f"{number}.png")
    found = estimate.stored_image(prepare(config(dataset=str(tmp_path / "pets"), max_train_samples=None)))
    assert found.shape == (7, 9, 3)
    assert found[0, 0].tolist() == [255, 0, 0]


def test_where_no_image_can_be_read_one_of_the_models_size_takes_its_place(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(8):
            (tmp_path / "pets" / name / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    image = estimate.stored_image(prepare(config(dataset=str(tmp_path / "pets"), max_train_samples=None)))
    assert (image.shape, image.dtype) == ((28, 28, 3), torch.uint8)


def test_a_stored_image_is_one_of_the_training_split(prepared: Prepared) -> None:
    assert estimate.stored_image(prepared).shape == (8, 8, 3)  # digits are stored as they are


def test_a_stored_photo_is_larger_for_random_crops(tmp_path: Path) -> None:
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "pets" / place).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (300, 300), (number, 0, 0)).save(tmp_path / "pets" / place / f"{number}.png")
    sides = {}
    for augment in ("none", "flip", "crop"):
        found = prepare(config(dataset=str(tmp_path / "pets"), max_train_samples=None, augment=augment, cache_gb=0))
        sides[augment] = [len(estimate.stored_image(found, crops=crops)) for crops in (None, False, True)]
        stored = {role: len(store.gather(np.arange(1))[0]) for role, (store, _) in found.decode().stores.items()}
        assert stored == {"train": sides[augment][0], "test": 28}
    large = round(28 / CROP_AREA**0.5)  # the smallest crop of it has as many pixels as the model's input
    assert sides == {"none": [28, 28, large], "flip": [28, 28, large], "crop": [large, 28, large]}


RESIDENT, KEPT = 10**9, 10**6  # bytes: of the process, and of what a forward pass of one image keeps
STORED: dict[str, Any] = dict.fromkeys(("width", "heads", "mlp", "layers")) | {"from_scratch": False, "image_size": 32}
PIXELS, IMAGE = 3 * 28 * 28, 3 * 8 * 8  # numbers that the model reads of an image, and bytes that are stored of one


@pytest.fixture
def sizes_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate.psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=RESIDENT))
    monkeypatch.setattr(estimate, "_saved_bytes", lambda prepared, images: KEPT * images)


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("adam", 2), ("sgd", 1)])
@pytest.mark.parametrize("batch_size", [16, 64])
def test_memory_is_weights_gradients_moments_activations_input_and_images(
    sizes_known: None, monkeypatch: pytest.MonkeyPatch, optimizer: str, moments: int, batch_size: int
) -> None:
    """Of 40 training images and 20 test images; numbers are float32."""
    found = prepare(config(optimizer=optimizer, batch_size=batch_size))
    weights = sum(parameter.numel() for parameter in found.loaded.model.parameters())
    trained = 4 * weights * (1 + moments) + 5 * KEPT + 4 * min(batch_size, 40) * PIXELS
    assert estimate.memory_bytes(found, 5) == RESIDENT + trained + 60 * IMAGE
    made = make_optimizer(found.loaded.model, found.config)
    estimate.pass_s(found, estimate.stored_image(found)[None])
    made.step()
    kept = sum(one.numel() for state in made.state.values() for one in state.values() if one.ndim)
    assert kept == moments * weights
    monkeypatch.setattr(estimate, "IN_MEMORY", 500)
    assert estimate.memory_bytes(found, 5) == RESIDENT + trained + 2 * 500  # more than that is read when it is needed
    found = found.with_settings(device="cuda")
    monkeypatch.setattr(estimate, "untouched", lambda prepared: nullcontext())
    assert estimate.memory_bytes(found, 5) == 4 * weights + trained  # the images stay in the process


@pytest.mark.parametrize(("augment", "kinds"), [("none", 1), ("flip", 2)])
def test_memory_of_a_probe_is_that_of_its_features(
    sizes_known: None, saved: Callable[..., Path], augment: str, kinds: int
) -> None:
    found = prepare(config(**STORED, model=str(saved()), freeze="backbone", augment=augment, epochs=9))
    head, features = 16 * 10 + 10, 16 * kinds
    floats = head * 3 + features * 40 + 3 * 32 * 32 * 16  # a gradient and two moments, images, a batch
    assert estimate.memory_bytes(found, 5) == RESIDENT + 4 * floats + 60 * IMAGE


def test_memory_with_gradient_checkpointing_follows_the_stage_table(
    sizes_known: None, saved: Callable[..., Path]
) -> None:
    plain, checkpointed = (prepare(config(layers=8, grad_checkpointing=on)) for on in (False, True))
    spec = shape_of(plain.loaded.model)
    assert spec is not None
    more, less = (estimate.memory_bytes(one, 5) for one in (plain, checkpointed))
    assert more is not None
    assert less is not None
    recomputed, saved_whole = (peak_activation_bytes(spec, 5, checkpointed=on) for on in (True, False))
    assert 5 * KEPT - (more - less) == 5 * KEPT * recomputed // saved_whole
    assert (
        estimate.memory_bytes(prepare(config(**STORED, model=str(saved("swin")), grad_checkpointing=True)), 5) is None
    )


def test_saved_activations_are_counted_in_training_mode(prepared: Prepared) -> None:
    prepared.loaded.model.vit.embeddings.dropout.p = 0.5  # what is dropped is kept for the backward pass
    prepared.loaded.model.eval()
    with estimate.untouched(prepared):
        counted = estimate._count_saved_bytes(prepared, 2)
        prepared.loaded.model.train()
        assert counted == estimate._count_saved_bytes(prepared, 2)
    prepared = prepared.with_settings(freeze="backbone")  # in it nothing is dropped
    with estimate.untouched(prepared):
        assert estimate._count_saved_bytes(prepared, 2) < counted
