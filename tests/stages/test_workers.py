"""Stages in several processes, through the command line: the numbers of one process, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.stages.commands import FAST, SHORT, online_settings, rows, run_stage, trimtab, without_times, write_run_file
from tests.stages.test_resume import EVIDENCE, differences, num_rows, start, wait_for_rows

GOLD = {"name": "gold", "world": "arithmetic"}
KILLS = EVIDENCE.with_name("kills_of_workers.json")


def settings_of(base, reward_run, **changed):
    critic = {"init": "policy", "optimizer": FAST}
    settings = online_settings(base, reward_run / "model", group_size=2, critic=critic, checkpoint_every=1)
    return settings | {"num_steps": 4} | changed


def assert_near(out: Path, other: Path) -> None:
    """The same samples, and metrics that differ by rounding."""
    for mine, theirs in zip(rows(out, "samples.jsonl"), rows(other, "samples.jsonl"), strict=True):
        assert (mine["prompt"], mine["response"]) == (theirs["prompt"], theirs["response"])
    for mine, theirs in zip(rows(out), rows(other), strict=True):
        exact = {k: v for k, v in theirs.items() if not k.startswith("time/") and k != "rollout/logprob_difference"}
        assert {k: mine[k] for k in exact} == pytest.approx(exact, rel=1e-4, abs=1e-6)


def approximately(found):
    """The same texts and structure, and numbers that differ by rounding."""
    if isinstance(found, dict):
        return {key: approximately(value) for key, value in found.items()}
    if isinstance(found, list):
        return [approximately(value) for value in found]
    return pytest.approx(found, rel=1e-4, abs=1e-6) if isinstance(found, float) else found


def children(process) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def is_there(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base, reward_run):
    """Four steps in one process."""
    return run_stage("online", tmp_path_factory.mktemp("workers") / "alone", **settings_of(base, reward_run))


def test_two_workers_sample_score_and_learn_as_one_process_does(tmp_path, base, reward_run, alone):
    run_file = write_run_file(tmp_path / "run.toml", settings_of(base, reward_run))
    result = trimtab("online", run_file, "--out", tmp_path / "run", "--workers", 2)
    assert result.exit_code == 0, result.output
    assert_near(tmp_path / "run", alone)
    assert "workers = 2" in (tmp_path / "run" / "settings.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_rollouts_that_lag_are_the_same_in_two_workers(tmp_path, base, reward_run, shard):
    settings = settings_of(base, reward_run, correction={"kind": "truncate"})
    alone = run_stage("online", tmp_path / "alone", **settings | {"engine": {"max_staleness": 1}})
    engine = {"max_staleness": 1, "workers": 2, "shard": shard}
    out = run_stage("online", tmp_path / "run", **settings | {"engine": engine})
    assert [row["rollout/version"] for row in rows(out)] == [0, 0, 1, 2]
    assert_near(out, alone)


def test_a_killed_run_leaves_no_process_and_goes_on_in_another_number_of_them(tmp_path, base, reward_run, alone):
    out = tmp_path / "run"
    run_file = write_run_file(tmp_path / "run.toml", settings_of(base, reward_run, engine={"workers": 3}))
    process = start("online", run_file, out)
    wait_for_rows(process, out, 2)
    workers = children(process)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5
    while any(map(is_there, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_there, workers))
    result = trimtab("online", run_file, "--out", out, "engine.workers=1")
    assert result.exit_code == 0, result.output
    assert "engine.workers 3 → 1" in result.output
    assert_near(out, alone)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_the_command_that_goes_on(tmp_path, base, reward_run, alone):
    out = tmp_path / "run"
    run_file = write_run_file(tmp_path / "run.toml", settings_of(base, reward_run, engine={"workers": 2}))
    process = start("online", run_file, out)
    wait_for_rows(process, out, 1)
    os.kill(children(process)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "worker 1 was killed by SIGKILL" in said
    assert "Traceback" not in said
    assert trimtab("online", run_file, "--out", out).exit_code == 0
    assert_near(out, alone)


@pytest.mark.slow
def test_every_other_stage_computes_in_two_processes_as_in_one(tmp_path, base, pairs):
    sampled = {"model": str(base), "sampling": SHORT}
    judged = {"prompts": "world:arithmetic?num=6", "rewards": [GOLD]}
    trained = {"batch_size": 4, "max_steps": 2, "optimizer": FAST}
    tiny = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "mlp_size": 48, "max_positions": 256}
    grown = {"data": "world:arithmetic", "num_documents": 8, "vocab_size": 280, "architecture": tiny, "batch_size": 4}
    found = {"world": "arithmetic", "num_prompts": 24, "num_held_out_prompts": 8, "agreement": 0.6}
    compared = {"prompts": "world:arithmetic?num=6", "world": "arithmetic", "baseline": str(base), "best_of": 2}
    for stage, settings, files in (
        ("pretrain", grown, ("metrics.jsonl",)),
        ("sft", {"model": str(base), "data": "world:arithmetic?num=12", **trained}, ("metrics.jsonl",)),
        ("reward", {"model": str(base), "data": str(pairs), **trained}, ("metrics.jsonl",)),
        ("preference", {"model": str(base), "data": str(pairs), **trained}, ()),
        ("compare", {**sampled, **found}, ("train.jsonl", "held_out.jsonl")),
        ("select", {**sampled, **judged, "filter": {"finished": False}, "replies_per_prompt": 2}, ("best.jsonl",)),
        ("evaluate", {**sampled, **compared}, ("samples.jsonl",)),
    ):
        one, two = (run_stage(stage, tmp_path / f"{stage}{n}", **settings, engine={"workers": n}) for n in (1, 2))
        for file in files:
            for mine, theirs in zip(rows(two, file), rows(one, file), strict=True):
                assert without_times([mine]) == approximately(without_times([theirs]))


@pytest.mark.slow
def test_adapters_of_policy_critic_and_reward_on_one_base(tmp_path, base, pairs):
    """Workers load no rewards, so the base of theirs has no adapter of the reward."""
    adapter = {"rank": 2}
    reward = {"model": str(base), "data": str(pairs), "batch_size": 4, "max_steps": 2, "optimizer": FAST}
    reward_run = run_stage("reward", tmp_path / "reward", **reward, adapter=adapter)
    settings = settings_of(base, reward_run, adapter=adapter, num_steps=2, critic={"init": "reward", "optimizer": FAST})
    alone, two = (run_stage("online", tmp_path / str(n), **settings, engine={"workers": n}) for n in (1, 2))
    assert_near(two, alone)


@pytest.mark.slow
def test_a_run_goes_on_in_one_two_sharded_three_and_one_process(tmp_path, base, reward_run, alone):
    engines = [{}, {"workers": 2, "shard": True}, {"workers": 3}, {}]
    for steps, engine in enumerate(engines, start=1):
        out = run_stage("online", tmp_path / "run", **settings_of(base, reward_run, num_steps=steps, engine=engine))
    assert_near(out, alone)


VLLM = os.environ.get("TRIMTAB_VLLM")
KILLED = {
    "two processes": {"workers": 2},
    "two processes, a sampler": {"workers": 2, "sampler": {"name": "process"}},
    "two processes, vLLM": {"workers": 2, "sampler": {"name": "vllm", "python": VLLM}},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", KILLED)
def test_any_process_killed_many_times_it_ends_with_the_same_bits(engine, tmp_path, reward_run):
    """Thirty kills (TRIMTAB_KILLS) of the controller, the worker or the sampler at random moments. A run that finishes
    is compared with one that was left alone, and the next one begun."""
    if "vLLM" in engine and not VLLM:
        pytest.skip("TRIMTAB_VLLM names no interpreter of an environment with vLLM")
    base = tiny.write_model_directory(tmp_path / "base", hidden_size=64)  # vLLM computes no narrower heads on a CPU
    wanted = int(os.environ.get("TRIMTAB_KILLS", "30"))
    draw = random.Random(0)
    settings = settings_of(base, reward_run, engine=KILLED[engine], num_steps=12)
    run_file = write_run_file(tmp_path / "run.toml", settings)
    undisturbed = tmp_path / "undisturbed"
    began = time.monotonic()
    whole_run = start("online", run_file, undisturbed)
    whole_run.communicate()
    assert whole_run.returncode == 0
    whole = time.monotonic() - began
    kills = dict.fromkeys(["controller", "worker", "sampler"][: 2 + ("sampler" in KILLED[engine])], 0)
    runs, late, out = 0, [], tmp_path / "run-0"
    while sum(kills.values()) < wanted or num_rows(out):
        process = start("online", run_file, out)
        time.sleep(draw.uniform(0.5, whole))
        who = draw.choice(list(kills))
        others = children(process) if process.poll() is None else []
        pid = process.pid if who == "controller" else next((pid for pid in others if who in command_of(pid)), None)
        if process.poll() is None and sum(kills.values()) < wanted and pid is not None:
            os.kill(pid, signal.SIGKILL)
            kills[who] += 1
            if who != "sampler":  # which is started again, and the run goes on
                killed = time.monotonic()
                process.communicate(timeout=60)  # a hang is an error
                late.append(time.monotonic() - killed)
        process.communicate(timeout=60 + 3 * whole)
        deadline = time.monotonic() + 5
        while any(map(is_there, others)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(is_there, others)), "a process outlived its controller"
        if (out / "summary.json").exists():
            assert not differences(undisturbed, out)
            runs += 1
            out = tmp_path / f"run-{runs}"
    found = {"kills": kills, "finished_runs": runs, "equal_runs": runs, "slowest_end_seconds": max(late)}
    print(json.dumps(found, indent=2))
    if os.environ.get("TRIMTAB_EVIDENCE") == "1":
        before = json.loads(KILLS.read_text(encoding="utf-8"))
        KILLS.write_text(json.dumps(before | {engine: found}, indent=2) + "\n", encoding="utf-8")


def command_of(pid: int) -> str:
    """The command line of a process; "" if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""
