"""The example of masks: its images are what it says, and it runs."""

import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import right_reasons  # noqa: E402

pytestmark = [pytest.mark.cpu("the example runs on the CPU"), pytest.mark.slow]


def test_the_decoy_says_the_class_in_training_and_lies_in_the_test():
    task = right_reasons.Task(50, 40)
    corner = ~task.relevant["all but the decoy"]
    assert (corner.flatten(1).sum(1) == right_reasons.DECOY**2).all()
    grey = right_reasons.GREY.flatten()
    for images, masks, classes, lies in (
        (task.decoyed, corner, task.y, False),
        (task.truthful, task.test_decoy[:, None], task.test_y, False),
        (task.lying, task.test_decoy[:, None], task.test_y, True),
    ):
        for image, mask, label in zip(images, masks, classes, strict=True):
            (level,) = image[:, mask[0]].unique()
            assert (level == grey[label]) == (not lies)
            assert level in grey
    assert torch.equal(task.decoyed[~corner.expand_as(task.decoyed)], task.clean[~corner.expand_as(task.clean)])
    assert 0 < task.relevant["digit"].float().mean() < 0.5


def test_a_quick_run(tmp_path, monkeypatch, capsys):
    options = ["--quick", "--output", str(tmp_path / "p.png"), "--json", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", ["right_reasons.py", *options])
    right_reasons.main()
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert list(rows) == list(right_reasons.CONTENDERS)
    assert all(0 <= row["accuracy, decoy lies"] <= 1 for (row,) in rows.values())
    assert rows["loss"][0]["δ on decoy"] < rows["without"][0]["δ on decoy"]
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert "| loss, digit marked" in capsys.readouterr().out
