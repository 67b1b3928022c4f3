import pytest

from trimtab.rewards.combined import load_rewards
from trimtab.rewards.shaping import Length, Overlong, Repetition


def scores(settings, rollouts):
    values, metrics = settings.load(token_budget=1).score(rollouts)
    return values.tolist(), metrics


def test_tokens_outside_the_range_are_charged_each(rollout):
    lengths = [0, 3, 5, 10, 12, 500]
    settings = Length(min_tokens=5, max_tokens=10, per_token=0.1, most=1.0)
    values, metrics = scores(settings, [rollout("x", num_tokens=n) for n in lengths])
    assert values == pytest.approx([-0.5, -0.2, 0, 0, -0.2, -1])
    assert metrics["reward/length_outside"].value == 4 / 6


def test_each_of_two_rewards_of_one_name_has_metrics_of_its_own(rollout):
    short, long = Length(max_tokens=1), Length(max_tokens=500)
    replies = [rollout("x", num_tokens=n) for n in (1, 5, 9, 600)]
    _, metrics = load_rewards([short, long], token_budget=1, cost=Length(max_tokens=5)).score(replies)
    outside = {name: m.value for name, m in metrics.items() if name.endswith("_outside")}
    assert outside == {
        "reward/length_outside": 3 / 4,
        "reward/length_2_outside": 1 / 4,
        "reward/cost_outside": 2 / 4,
    }


def test_tokens_that_an_environment_wrote_are_not_charged(rollout):
    assert scores(Length(max_tokens=10), [rollout("x", num_tokens=10, observed=90)])[0] == [0]


def test_overlong_replies_are_punished_as_in_the_paper(rollout):
    # Yu et al., arXiv:2503.14476, eq. 13, with L_max = 20 and L_cache = 4: free to 16, a line to -1 at 20, -1 beyond
    lengths = [1, 16, 17, 18, 20, 21, 100]
    values, metrics = scores(Overlong(max_tokens=20, buffer_tokens=4), [rollout("x", num_tokens=n) for n in lengths])
    assert values == [0, 0, -0.25, -0.5, -1, -1, -1]
    assert metrics["reward/overlong_punished"].value == 5 / 7


def test_repeated_ngrams_are_charged_by_their_share(rollout):
    # a b a b a: bigrams ab ba ab ba, of which two repeat
    replies = [rollout(text) for text in ("a b a b a", "a b c d e", "a", "")]
    assert scores(Repetition(n=2), replies)[0] == [-0.5, 0, 0, 0]
    assert scores(Repetition(n=2, free=0.25), replies)[0] == pytest.approx([-1 / 3, 0, 0, 0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Length(min_tokens=5, max_tokens=4), "no range"),
        (lambda: Length(max_tokens=4, per_token=-1), "per_token = -1; it must be at least 0"),
        (lambda: Overlong(max_tokens=4, buffer_tokens=5), "buffer_tokens = 5"),
        (lambda: Overlong(max_tokens=4, buffer_tokens=0), "buffer_tokens = 0"),
        (lambda: Repetition(n=0), "n = 0"),
        (lambda: Repetition(free=1), "free = 1; it must be at least 0 and below 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
