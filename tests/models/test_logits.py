"""What a model makes of its head's output is found whatever it is called, or refused."""

import pytest

from tests.architectures import families
from tests.tiny import causal
from trimtab.core.errors import EngineError
from trimtab.models.logits import LogitShape, logit_shape


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("llama", LogitShape()),
        ("gpt_neox", LogitShape()),
        ("gemma2", LogitShape(1.0, 2.0)),
        ("nanochat", LogitShape(1.0, 2.0)),
        ("cohere", LogitShape(0.7)),
        ("granite", LogitShape(1 / 3.0)),
    ],
)
def test_scale_and_cap_are_found(name, shape):
    assert logit_shape(families.causal(name)) == shape


def test_a_cap_is_found_while_the_weights_are_still_too_small_to_reach_it():
    config = families.config_of("gemma2", final_logit_softcapping=30.0)
    from transformers import AutoModelForCausalLM

    assert logit_shape(AutoModelForCausalLM.from_config(config)) == LogitShape(1.0, 30.0)


def test_a_scale_that_no_setting_names_is_found_too():
    model = causal("llama")
    model.lm_head.register_forward_hook(lambda m, i, output: output * 0.3717)
    found = logit_shape(model)
    # Seen from outside, the head is what the hook makes of it.
    assert found == LogitShape()
    other = causal("llama")
    other.register_forward_hook(lambda m, i, output: output.__setitem__("logits", output.logits * 0.3717) or output)
    assert logit_shape(other).scale == pytest.approx(0.3717, rel=1e-6)


def test_logits_that_are_something_else_are_refused():
    model = causal("llama")
    model.register_forward_hook(lambda m, i, output: output.__setitem__("logits", output.logits.relu()) or output)
    with pytest.raises(EngineError, match="its logits are not its head applied to its hidden states"):
        logit_shape(model)
    short = causal("llama")
    short.register_forward_hook(lambda m, i, output: output.__setitem__("logits", output.logits[..., :60]) or output)
    with pytest.raises(EngineError, match="it gives 60 logits from a head of 64"):
        logit_shape(short)
