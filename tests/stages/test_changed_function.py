"""A function of the user's that changes under a run is noticed when the run goes on."""

from __future__ import annotations

import json

from trimtab.core import config
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.pipeline import open_run


def test_a_run_that_goes_on_with_a_changed_reward_says_so_and_records_it(tmp_path, capsys):
    code = tmp_path / "mine.py"
    code.write_text("def f(prompt, response, facts): return 1.0\n", encoding="utf-8")
    values = {"model": "m", "prompts": "p.jsonl", "rewards": [{"name": "callable", "function": f"{code}:f"}]}
    settings = config.resolve(OnlineSettings, values, where="the test")
    for _ in range(2):
        open_run(tmp_path / "run", "online", settings).close()
        assert "goes on with" not in capsys.readouterr().err
    code.write_text("def f(prompt, response, facts): return 2.0\n", encoding="utf-8")
    open_run(tmp_path / "run", "online", settings).close()
    said = capsys.readouterr().err
    assert f"the run began with the function of rewards.0 '{code}:f (" in said
    assert "what was learnt before was judged by that one" in said
    noted = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert list(noted["resumed_with"][0]) == ["paths.function of rewards.0"]
