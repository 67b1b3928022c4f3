from __future__ import annotations

import json
from typing import ClassVar

import pytest

from trimtab import worlds
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.types import Message, Prompt, from_dict, prompt_id, to_dict

NAMES = ("helpdesk", "arithmetic", "catalogue")


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_prompt(name):
    world = worlds.load(name)
    ids = {split: {p.id for p in world.prompts(split, 300)} for split in worlds.SPLITS}
    assert all(len(found) == 300 for found in ids.values())
    assert not ids["train"] & ids["validation"]
    assert not (ids["train"] | ids["validation"]) & ids["test"]
    assert not ids["train"] & {d.prompt.id for d in world.demonstrations("test", 300, seed=7)}


def test_splits_hold_their_shares_of_all_prompts():
    splits = [worlds.split_of(str(i)) for i in range(20_000)]
    assert splits.count("train") / 20_000 == pytest.approx(0.8, abs=0.015)
    assert splits.count("validation") / 20_000 == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_a_function_of_the_seeds(name):
    world, again, other = worlds.load(name, seed=1), worlds.load(name, seed=1), worlds.load(name, seed=2)
    assert world.demonstrations("train", 20, seed=3) == again.demonstrations("train", 20, seed=3)
    assert world.documents(20, seed=3) == again.documents(20, seed=3)
    assert world.prompts("train", 20, seed=3) != world.prompts("train", 20, seed=4)
    assert world.prompts("train", 20, seed=3) != other.prompts("train", 20, seed=3)


@pytest.mark.parametrize("name", NAMES)
def test_gold_needs_only_what_survives_json(name):
    world = worlds.load(name)
    for demo in world.demonstrations("validation", 50):
        prompt = from_dict(Prompt, json.loads(json.dumps(to_dict(demo.prompt))))
        assert world.gold(prompt, demo.response) == world.gold(demo.prompt, demo.response)
        assert world.replies(prompt, 3) == world.replies(demo.prompt, 3)


class ThirtyPrompts(worlds.World):
    name = "thirty"
    biases: ClassVar = {}

    def draw_prompt(self, rng):
        return Prompt(messages=(Message("user", str(rng.randrange(30))),))

    def write_reply(self, prompt, rng):
        return "yes"

    def gold(self, prompt, response):
        return worlds.Gold(1.0, {})

    def features(self, response):
        return {}


def test_too_many_prompts_are_refused_with_the_number_there_is():
    ids = {prompt_id((Message("user", str(i)),)) for i in range(30)}
    num = sum(worlds.split_of(i) == "train" for i in ids)
    assert {p.id for p in ThirtyPrompts().prompts("train", num)} <= ids
    with pytest.raises(DataError, match="distinct prompts") as caught:
        ThirtyPrompts().prompts("train", num + 1)
    assert f"at most {num} " in caught.value.fix


def test_an_unknown_world_or_split_is_named():
    with pytest.raises(ConfigError, match="helpdesk"):
        worlds.load("helpdesc")
    with pytest.raises(DataError, match="validation"):
        worlds.load("helpdesk").prompts("dev", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_sets_are_written_in_layouts_any_tool_reads(name, tmp_path):
    counts = worlds.write_sets(worlds.load(name), 40, tmp_path, seed=5)
    names = ("demonstrations", "comparisons", "prompts", "documents")
    assert counts == {
        f"{split}/{name}.jsonl": 40 if split == "train" else 4 for split in worlds.SPLITS for name in names
    }
    rows = {path: [json.loads(line) for line in (tmp_path / path).read_text().splitlines()] for path in counts}
    assert {path: len(found) for path, found in rows.items()} == counts
    for row in rows["train/demonstrations.jsonl"]:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    for row in rows["train/comparisons.jsonl"]:
        assert row.keys() == {"prompt", "chosen", "rejected"}
        assert row["chosen"][0]["role"] == "assistant"
        assert row["chosen"] != row["rejected"]
    assert rows["test/prompts.jsonl"][0].keys() == {"prompt", "id", "facts"}
    assert all(row["text"] for row in rows["validation/documents.jsonl"])
