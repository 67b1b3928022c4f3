"""Actions, observations, and what is no action."""

import pytest

from trimtab import worlds
from trimtab.core.errors import DataError
from trimtab.core.types import Message, Observation, Prompt
from trimtab.environments.react import ReAct, read_corpus
from trimtab.environments.tools import ToolError

PROMPT = Prompt(messages=(Message("user", "Price of 2 x blue lamp?"),))
CATALOGUE = worlds.load("catalogue")


def answer(turn, **settings):
    environment = ReAct(**{"corpus": "world:catalogue"} | settings).load()
    return environment.step(environment.reset(PROMPT, seed=0), turn)


def test_a_search_is_answered_on_a_line_of_its_own():
    said = answer("I look it up.\nAction: search[blue lamp]\n")
    text = f"Observation: The blue lamp costs {CATALOGUE.price('blue lamp')}.\n"
    assert said == Observation(text=text, events={"tool_calls": 1, "tool_errors": 0})


def test_a_calculation_is_answered():
    assert answer("Action: calculate[473 * 2]\n").text == "Observation: 946\n"
    assert answer("Action:calculate[ 7/2 ]").text == "Observation: 3.5\n"


def test_several_passages_are_shown_the_best_first():
    said = answer("Action: search[blue lamp]\n", num_passages=3).text
    first, second, third = said.removeprefix("Observation: ").strip().split(" | ")
    assert first.startswith("The blue lamp costs")
    assert "blue" in second or "lamp" in second
    assert third not in (first, second)


@pytest.mark.parametrize(
    ("turn", "error", "calls"),
    [
        ("Action: calculate[1 / 0]\n", "division by zero", 1),
        ("Action: calculate[os.system('ls')]\n", "cannot read", 1),
        ("Action: search[zebra]\n", "nothing is found", 1),
        ("Action: look[blue lamp]\n", "no tool is called 'look'; there are search, calculate", 1),
        ("As in [1]\n", "Action: search[words]", 0),
        ("Action: search [blue lamp]\n", "Action: search[words]", 0),
    ],
)
def test_mistakes_are_observations_and_are_counted(turn, error, calls):
    said = answer(turn)
    assert said.text.startswith("Observation: error: ")
    assert error in said.text
    assert said.text.count("\n") == 1
    assert said.events == {"tool_calls": calls, "tool_errors": 1}
    assert not said.done


@pytest.mark.parametrize("turn", ["#### 946", "", "search[blue lamp]", "Action: search[blue\nlamp]"])
def test_a_turn_without_an_action_is_the_last(turn):
    assert answer(turn).done


def test_only_the_last_action_of_a_turn_counts():
    assert answer("Action: calculate[1]\nObservation: 5\nAction: calculate[2]").text == "Observation: 2\n"


def test_a_tool_that_is_not_there_cannot_be_used():
    said = answer("Action: search[lamp]\n", tools=("calculate",), corpus=None)
    assert "there are calculate" in said.text


def test_a_bug_in_a_tool_is_no_observation():
    environment = ReAct(corpus="world:catalogue").load()
    environment.tools = {"search": lambda text: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        environment.step(None, "Action: search[x]\n")


def test_tools_may_say_what_is_wrong_with_a_call():
    def refuse(text):
        raise ToolError("not\ntoday")

    environment = ReAct(corpus="world:catalogue").load()
    environment.tools = {"search": refuse}
    assert environment.step(None, "Action: search[x]\n").text == "Observation: error: not today\n"


@pytest.mark.parametrize(
    "settings",
    [
        {"tools": ()},
        {"tools": ("search",)},
        {"tools": ("calculate",), "corpus": "world:catalogue"},
        {"num_passages": 0, "corpus": "x"},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(ValueError, match=r"tools|num_passages"):
        ReAct(**settings)


def test_a_corpus_is_a_file_with_texts(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "Cats sleep a lot."}\n{"text": "Dogs\\nbark."}\n')
    assert read_corpus(str(path)) == ["Cats sleep a lot.", "Dogs\nbark."]
    assert answer("Action: search[dogs]\n", corpus=str(path)).text == "Observation: Dogs bark.\n"


@pytest.mark.parametrize("line", ['{"txt": "x"}', '{"text": 3}', '{"text": " "}', "{"])
def test_a_row_of_the_corpus_without_a_text_is_named(tmp_path, line):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match="row 2"):
        read_corpus(str(path))


def test_a_world_without_texts_says_so():
    with pytest.raises(DataError, match="no texts to look things up in"):
        read_corpus("world:helpdesk")
