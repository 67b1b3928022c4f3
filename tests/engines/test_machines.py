"""Constants of machines say where they come from, and survive a file."""

import json

import pytest

from trimtab.core.errors import ConfigError, TrimtabError
from trimtab.engines.machines import MACHINES, UNITS, find_machine, machine_of, write_machine

FOUND = {"float32_products": 2e11, "bfloat16_products": 4e11, "bandwidth": 1e10, "memory": 16.0, "context": 0.4}


@pytest.mark.parametrize("machine", [*MACHINES.values(), machine_of("mine", "cpu", FOUND, "a test")])
def test_every_constant_is_there_with_its_unit_and_its_source(machine):
    assert set(machine.constants) == set(UNITS)
    for name, constant in machine.constants.items():
        assert constant.unit == UNITS[name], name
        assert constant.source, name
        assert constant.value > 0, name


def test_only_what_was_measured_there_is_called_so():
    assert "measured" in {c.origin for c in MACHINES["h200"].constants.values()}
    for other in ("h100", "a100"):
        assert "measured" not in {c.origin for c in MACHINES[other].constants.values()}
    mine = machine_of("mine", "cpu", FOUND, "a test")
    assert {name for name, c in mine.constants.items() if c.origin == "measured"} == set(FOUND)


def test_another_gpu_has_the_ratio_of_its_products():
    found = {"float32_products": 25e12, "bfloat16_products": 360e12, "bandwidth": 2e12, "memory": 40.0}
    mine = machine_of("mine", "gpu", found, "a test")
    assert mine["attention_forward"] == MACHINES["h200"]["attention_forward"] / 2
    assert mine["memory"] == 40


def test_a_machine_comes_back_from_its_file(tmp_path):
    file = tmp_path / "runs" / "machine.json"
    mine = machine_of("mine", "cpu", FOUND, "a test")
    write_machine(mine, file)
    assert find_machine(str(file)) == mine


def test_what_is_no_machine_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no machine 'h1000' is known"):
        find_machine("h1000")
    file = tmp_path / "machine.json"
    for text, said in (
        ("[]", "it holds no table"),
        ("{", "is damaged"),
        ("{}", "no description of a machine"),
        ('{"name": "mine", "kind": "cpu", "constants": []}', "no description of a machine"),
        ('{"name": "mine", "kind": "cpu", "constants": {"memory": 16}}', "no description of a machine"),
    ):
        file.write_text(text)
        with pytest.raises(TrimtabError, match=said):
            find_machine(str(file))
    write_machine(machine_of("mine", "cpu", FOUND, "a test"), file)
    values = json.loads(file.read_text())
    del values["constants"]["memory"]
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="missing or wrong: memory"):
        find_machine(str(file))


@pytest.mark.parametrize("value", ["fast", None, [1e11], {}, True, -1.0, float("nan"), float("inf"), 0, 0.0])
def test_a_rate_that_is_none_is_named(tmp_path, value):
    file = tmp_path / "machine.json"
    write_machine(machine_of("mine", "cpu", FOUND, "a test"), file)
    values = json.loads(file.read_text())
    values["constants"]["float32_products"]["value"] = value
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="missing or wrong: float32_products"):
        find_machine(str(file))


def test_what_is_not_divided_by_may_be_nothing_and_unknown_constants_are_left_out(tmp_path):
    file = tmp_path / "machine.json"
    write_machine(machine_of("mine", "cpu", FOUND, "a test"), file)
    values = json.loads(file.read_text())
    values["constants"]["slack"]["value"] = 0
    values["constants"]["of another version"] = {"value": "any"}
    file.write_text(json.dumps(values))
    found = find_machine(str(file))
    assert found["slack"] == 0
    assert "of another version" not in found.constants
