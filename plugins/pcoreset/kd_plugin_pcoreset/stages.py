"""The rounds: train a fresh student on all labels so far, buy more, begin again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from kd_plugin_pcoreset.augment import FILE
from kdcore import InputError, Stage
from kdcore.stages import Distill, StageRun

USE = "pcoreset"


class ActiveRounds(Stage):
    """``count`` purchases, so ``count`` + 1 trainings of the recipe, each of a student made anew.

    The recipe's augmentation ``pcoreset`` buys in each; its ``labelled`` is set here from the second training on. The
    last training's student is the run's. Artefacts: ``student``, ``results``, ``labelled`` (the file of the ids that the
    last student learned from) and ``test`` (every round's test metrics of the student, in order).
    """

    def __init__(self, *, count: Annotated[int, Field(gt=0)] = 5) -> None:
        self.count = count

    def run(self, run: StageRun) -> dict[str, Any]:
        places = [i for i, table in enumerate(run.recipe.augmentation) if table.use == USE]
        if len(places) != 1:
            hint = f'[[augmentation]] use = "{USE}"'
            raise InputError(
                "augmentation", "the rounds need one that buys labels", given=len(places), hint=hint
            )
        test, paid = [], run.recipe.augmentation[places[0]].params.get("labelled")
        for index in range(self.count):
            over = _buying(run, places[0], paid)
            found = run.child(Distill(), f"round-{index}", over, offset=index)
            test.append(found["results"]["test"]["student"])
            paid = str(run.folder / f"round-{index}" / FILE)
        last = replace(
            run, recipe=run.over(_buying(run, places[0], paid)), seed_offset=run.seed_offset + self.count
        )
        found = Distill().run(last)
        test.append(found["results"]["test"]["student"])
        return {**found, "labelled": str(paid), "test": test}


def _buying(run: StageRun, place: int, paid: str | None) -> Mapping[str, Any]:
    """The recipe's augmentations, the buyer's list of labelled samples set."""
    tables = [table.model_dump(exclude_unset=True) for table in run.recipe.augmentation]
    if paid is not None:
        tables[place]["labelled"] = paid
    return {"augmentation": tables}


def bought(folder: Path) -> list[list[int]]:
    """The ids bought after each training but the last, of a run's stage folder, in order."""
    files = sorted(folder.glob(f"round-*/{FILE}"), key=lambda path: int(path.parent.name.partition("-")[2]))
    return [json.loads(path.read_text("utf-8"))["bought"] for path in files]
