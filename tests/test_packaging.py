"""What operators install beside the package: the unit is one that systemd takes,
the dashboard asks for what is exported."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.repository import REPOSITORY
from support.stat_record import stat_record

from tierstore.daemon.families import families_of
from tierstore.tools.cli import cli

UNIT = REPOSITORY / "packaging" / "tierstore@.service"
DASHBOARD = REPOSITORY / "packaging" / "grafana-dashboard.json"


def exported() -> dict[str, set[str]]:
    """Labels by the name of each sample that a daemon exports, remote calls and re-plans included."""
    labels: dict[str, set[str]] = {}
    for family in families_of(stat_record()):
        assert family.samples, family.name
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def texts_of(value: Any, *keys: str) -> list[str]:
    """All texts that lie under some keys, anywhere in a JSON value."""
    if isinstance(value, list):
        return [text for part in value for text in texts_of(part, *keys)]
    if not isinstance(value, dict):
        return []
    here = [part for key, part in value.items() if key in keys and isinstance(part, str)]
    return here + [text for part in value.values() for text in texts_of(part, *keys)]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


EXPRESSIONS = texts_of(dashboard(), "expr")
PANELS = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def test_every_metric_of_the_dashboard_is_exported_and_every_exported_one_is_shown() -> None:
    asked = {name for text in texts_of(dashboard(), "expr", "query") for name in re.findall(r"\btierstore_\w+", text)}
    there = set(exported())
    assert asked <= there
    not_shown = {"tierstore_start_time_seconds", "tierstore_next_replan_seconds", "tierstore_last_replan_time_seconds"}
    assert there - asked == not_shown


@pytest.mark.parametrize("expression", sorted(set(EXPRESSIONS)))
def test_every_label_of_an_expression_is_one_of_its_metrics(expression: str) -> None:
    labels = exported()
    names = re.findall(r"(tierstore_\w+)(\{[^}]*\})?", expression)
    assert names
    grouped = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")}
    for name, selector in names:
        selected = set(re.findall(r"(\w+)=", selector))
        assert "instance" in selected, f"{name} is not of the chosen daemons"
        assert selected | grouped <= labels[name] | {"instance"}
    assert expression.count("(") == expression.count(")")


def test_counters_are_asked_for_by_rate_and_gauges_are_not() -> None:
    kinds = {sample.name: family.type for family in families_of(stat_record()) for sample in family.samples}
    for expression in EXPRESSIONS:
        for before, name in re.findall(r"(\w*\(?)(tierstore_\w+)", expression):
            rated = before in ("rate(", "increase(")
            assert rated == (kinds[name] in ("counter", "histogram")), expression


def test_legends_name_labels_that_the_series_have() -> None:
    labels = exported()
    for panel in PANELS:
        for target in panel["targets"]:
            grouped = re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", target["expr"])))
            bare = {"instance"}.union(*(labels[name] for name in re.findall(r"tierstore_\w+", target["expr"])))
            left = set(grouped) if grouped else set() if "sum(" in target["expr"] else bare
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= left, target


def test_panels_have_names_words_units_and_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    assert all(panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


def test_the_dashboard_shows_hits_latency_reads_budget_and_clients() -> None:
    titles = {panel["title"] for panel in PANELS}
    assert titles >= {
        "Hits by tier",
        "Hit rate by order",
        "Lookups",
        "Latency of lookups",
        "NVMe reads",
        "Budget",
        "Clients",
        "Epochs",
        "Losses",
    }


def unit() -> configparser.RawConfigParser:
    """The unit, whose settings are each given once."""
    parser = configparser.RawConfigParser(strict=True, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str
    parser.read_string(UNIT.read_text())
    return parser


def test_the_unit_waits_for_ready_starts_again_and_keeps_to_its_user() -> None:
    service = dict(unit()["Service"])
    assert (service["Type"], service["Restart"], service["UMask"]) == ("notify", "on-failure", "0077")
    assert service["RuntimeDirectoryMode"] == "0700"
    assert service["ExecStart"].split()[1:5] == ["serve", "${STORE}", "--socket", "${RUNTIME_DIRECTORY}/tierstore.sock"]
    assert int(service["LimitNOFILE"]) >= 65536
    assert {"LimitMEMLOCK", "RuntimeDirectory", "NoNewPrivileges", "SystemCallFilter"} <= set(service)
    assert "PrivateUsers" not in service  # credentials of clients would all be nobody's


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not on this machine")
    text = UNIT.read_text().replace("/usr/local/bin/tierstore", "/bin/true")
    copy = tmp_path / "tierstore@v41.service"
    copy.write_text(text)
    done = subprocess.run([analyze, "verify", "--man=no", copy], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_files_are_printed_by_a_command_as_they_are_in_the_repository() -> None:
    assert invoke("packaging", "grafana") == DASHBOARD.read_text()
    assert invoke("packaging", "proto") == (REPOSITORY / "tierstore" / "remote" / "lookup.proto").read_text()
    unit_text = invoke("packaging", "systemd")
    (start,) = re.findall(r"^ExecStart=(\S+) serve", unit_text, re.MULTILINE)
    assert unit_text.replace(start, "/usr/local/bin/tierstore") == UNIT.read_text()
    assert Path(start).is_absolute()
    assert Path(start).name == "tierstore"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_installed_files_are_those_of_the_repository() -> None:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    installed = {
        file
        for pattern in config["options.package_data"]["tierstore"].split()
        if pattern.startswith("packaging/")
        for file in (REPOSITORY / "tierstore").glob(pattern)
    }
    assert {file.name for file in installed} == {file.name for file in (REPOSITORY / "packaging").iterdir()}
