"""Computing activations again wakes nothing that evaluation mode switches off."""

import gc
import weakref

import pytest
import torch

from tests.architectures import families
from tests.models.test_forward import some_trees
from trimtab.core.errors import EngineError
from trimtab.models.roles import Policy

DROPOUTS = {
    "opt": {"dropout": 0.2, "attention_dropout": 0.2},
    "starcoder2": {"residual_dropout": 0.2, "embedding_dropout": 0.2, "attention_dropout": 0.2},
    "bloom": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "mixtral": {"router_jitter_noise": 0.3, "attention_dropout": 0.2},
    "phimoe": {"input_jitter_noise": 0.3, "router_jitter_noise": 0.3, "attention_dropout": 0.2},
    "seed_oss": {"residual_dropout": 0.2, "attention_dropout": 0.2},
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_and_router_noise_stay_off(name):
    trees = some_trees()
    results = []
    for checkpoint in (False, True):
        policy = Policy(families.causal(name, **DROPOUTS[name]), pad_id=0)
        if checkpoint:
            policy.checkpoint_activations()
        logprobs = policy(trees).logprobs
        logprobs.sum().backward()
        results.append([logprobs.detach(), torch.cat([g.flatten() for g in families.gradients(policy).values()])])
    (plain, plain_gradient), (ours, gradient) = results
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
    assert float((gradient - plain_gradient).norm() / plain_gradient.norm()) < 1e-5


def test_activations_are_really_computed_again():
    policy = Policy(families.causal("opt"), pad_id=0)
    policy.checkpoint_activations()
    calls = []
    policy.model.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: calls.append(1))
    policy(some_trees()).logprobs.sum().backward()
    assert len(calls) == 2


def test_a_model_that_cannot_is_refused():
    policy = Policy(families.causal("llama"), pad_id=0)
    policy.model.supports_gradient_checkpointing = False
    with pytest.raises(EngineError, match="cannot compute its activations again"):
        policy.checkpoint_activations()


def test_a_model_ends_with_its_last_user():
    # Blocks that hold themselves would stay in memory beside the next model until Python looks for circles.
    gc.collect()
    gc.disable()
    try:
        policy = Policy(families.causal("llama"), pad_id=0)
        policy.checkpoint_activations()
        policy(some_trees()).logprobs.sum().backward()
        weights = [weakref.ref(p) for p in policy.parameters()]
        del policy
        assert not [w for w in weights if w() is not None]
    finally:
        gc.enable()
