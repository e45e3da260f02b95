"""How sure a prediction has to be, by what a model said about validation images."""

from pathlib import Path

from vitft.checkpoints.checkpoint import find_model, run_of
from vitft.checkpoints.exported import Document
from vitft.checkpoints.metadata import read_card
from vitft.errors import UsageError
from vitft.evaluation.calibration import FEWEST, Coverage, at_temperature, precise, thresholds
from vitft.evaluation.results import read_results
from vitft.io import console
from vitft.io.paths import expanded


def temperature_of(checkpoint: str | Path, document: Document | None) -> float:
    """The temperature that a checkpoint was given on validation images; of an exported file, its own.

    `document` is what an exported file says of itself. Raises UsageError if there is none.
    """
    folder = find_model(expanded(checkpoint))
    known = document or (read_card(folder) if folder.is_dir() else None)
    if known is None or known.temperature is None:
        why = f"the best checkpoint of a run with {FEWEST} validation images or more has one, and its exports"
        raise UsageError(f"calibrated: {checkpoint} has no temperature; {why}.")
    return known.temperature


def threshold_of(
    checkpoint: str | Path, document: Document | None, precision: float, *, calibrated: bool
) -> float:  # fmt: skip
    """The confidence from which on so many of the validation images are right; says how many those are.

    `document` is what an exported file says of itself; `calibrated`: confidences are those at the temperature. Raises
    UsageError if there are no validation images of the checkpoint, or no confidence is enough.
    """
    if document is None:
        known, images = _of_run(checkpoint, calibrated=calibrated)
    else:
        known, images = _of_file(checkpoint, document, calibrated=calibrated)
    found = precise(known, precision)
    if found is None:
        raise UsageError(f"min_precision {precision:g}: not even the surest validation images reach it; ask for less.")
    console.note(
        f"deciding from a confidence of {found.confidence:.4f} on: that is {console.percent(found.coverage)} of "
        f"{images:,} validation images, of which {console.percent(found.accuracy)} are right"
    )
    return found.confidence


def _of_run(checkpoint: str | Path, *, calibrated: bool) -> tuple[list[Coverage], int]:
    """What each confidence leads to, and of how many images, by the predictions that a run left."""
    folder = find_model(expanded(checkpoint))
    run, card = run_of(folder), read_card(folder) if folder.is_dir() else None
    results = None if run is None else read_results(run)
    said = None
    if results is not None and card is not None and card.step == results.step and "validation" in results.splits:
        said = results.predictions("validation")
    if said is None:
        raise UsageError(f"min_precision: {checkpoint} has no predictions of validation images to choose by.")
    if calibrated:
        said = at_temperature(said, temperature_of(checkpoint, None))
    return thresholds(said), len(said.truth)


def _of_file(checkpoint: str | Path, document: Document, *, calibrated: bool) -> tuple[list[Coverage], int]:
    """The same, as it is written in an exported file: its probabilities may be others than those of the run."""
    known = document.thresholds or {}
    curve = known.get("calibrated" if calibrated else "plain")
    if curve is None:
        raise UsageError(
            f"min_precision: {checkpoint} was exported without validation images to choose by; export it again where "
            "the run's dataset is, or give a confidence."
        )
    return [Coverage(*row) for row in curve], known["images"]
