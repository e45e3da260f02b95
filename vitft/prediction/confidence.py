"""How sure a prediction has to be, by what the run said about its validation images."""

from pathlib import Path

from vitft.checkpoints.checkpoint import find_model, run_of
from vitft.checkpoints.metadata import read_card
from vitft.errors import UsageError
from vitft.evaluation.calibration import FEWEST, at_temperature, threshold_for
from vitft.evaluation.results import read_results
from vitft.io import console
from vitft.io.paths import expanded


def temperature_of(checkpoint: str | Path) -> float:
    """The temperature that a checkpoint was given on validation images. Raises UsageError if it has none."""
    folder = find_model(expanded(checkpoint))
    card = read_card(folder) if folder.is_dir() else None
    if card is None or card.temperature is None:
        why = f"the best checkpoint of a run with {FEWEST} validation images or more has one"
        raise UsageError(f"calibrated: {checkpoint} has no temperature; {why}.")
    return card.temperature


def threshold_of(checkpoint: str | Path, precision: float, temperature: float) -> float:
    """The confidence from which on so many of a run's validation images are right; says how many those are.

    Raises UsageError if there are no validation images of the checkpoint, or no confidence is enough.
    """
    folder = find_model(expanded(checkpoint))
    run, card = run_of(folder), read_card(folder) if folder.is_dir() else None
    results = None if run is None else read_results(run)
    said = None
    if results is not None and card is not None and card.step == results.step and "validation" in results.splits:
        said = results.predictions("validation")
    if said is None:
        raise UsageError(f"min_precision: {checkpoint} has no predictions of validation images to choose by.")
    said = said if temperature == 1.0 else at_temperature(said, temperature)
    found = threshold_for(said, precision)
    if found is None:
        raise UsageError(f"min_precision {precision:g}: not even the surest validation images reach it; ask for less.")
    console.note(
        f"deciding from a confidence of {found.confidence:.4f} on: that is {console.percent(found.coverage)} of "
        f"{len(said.truth):,} validation images, of which {console.percent(found.accuracy)} are right"
    )
    return found.confidence
