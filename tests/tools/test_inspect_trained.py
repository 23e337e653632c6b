"""`tierstore inspect` of stores that were trained, published and compacted, or made from scratch."""

from __future__ import annotations

import json
from pathlib import Path

from support.committed import Committed
from support.stores import make_model
from support.text_store import good, good_json
from support.versions import make_versions

from tierstore import SGD
from tierstore.offline.compact import compact
from tierstore.training.commits import pin


def test_versions_and_commits_are_counted_and_sized(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", plain=False)
    model.build(tmp_path / "store")
    assert good_json("inspect", tmp_path / "store")["training"] is None
    versions = make_versions(model, tmp_path / "store", 2)
    made = Committed(versions.store, SGD(lr=0.1))
    for step in (100, 1200):
        made.write("layers.1", 40)
        made.commit(step=step)
    pin(versions.store, 1)
    record = good_json("inspect", versions.store)
    assert record["versions"] == {
        "newest": 2,
        "folded": 0,
        "rows": {name: int(versions.touched(name, 2).sum()) for name in model.rows},
        "num_bytes": sum(file.stat().st_size for file in (versions.store / "versions").glob("*.rows")),
    }
    assert record["training"] == {
        "rule": "sgd", "commits": 2, "newest": 2, "step": 1200, "opens_at": 2, "pinned": [1], "runs": 2, "missing": [],
        "num_bytes": sum(file.stat().st_size for file in (versions.store / "training").glob("*.run")),
    }  # fmt: skip
    shown = good("inspect", versions.store).stdout
    assert "versions: readers open version 2; " in shown
    assert "training: sgd, commit 2 of step 1,200 is the newest of 2, 1 pinned; 2 runs, " in shown
    compact(versions.store, tmp_path / "compacted")
    assert f"compacted from version 2 of {versions.store}" in good("inspect", tmp_path / "compacted").stdout


def test_a_store_from_scratch_is_inspected_too(tmp_path: Path) -> None:
    good("synth", tmp_path / "model", "--family", "deepseek_v41", "--size", "1MiB")
    good("init", tmp_path / "model", tmp_path / "store", "--dtype", "bf16")
    record = json.loads(good("inspect", tmp_path / "store", "--json").stdout)
    assert (record["from_scratch"], record["store_bytes"], record["versions"]["newest"]) == (True, 0, 0)
    assert "made by tierstore init" in good("inspect", tmp_path / "store").stdout
    assert "0 shards open" not in good("doctor", tmp_path / "store").stdout
