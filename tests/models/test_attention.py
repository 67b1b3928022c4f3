"""Nothing that a model hands to its attention is dropped: it is computed, or refused."""

import pytest
import torch

from tests.architectures import families
from tests.models.test_forward import relative_difference, some_trees
from tests.tiny import causal
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core.errors import EngineError
from trimtab.models.attention import ROW_ATTENTION, attending, backbone, row_attention, row_mask, row_states
from trimtab.models.tree_attention import masked_attention, tree_attention


def chunks_of_4(asking, seen):
    return asking // 4 == seen // 4


@pytest.mark.parametrize("window", [None, 3, chunks_of_4])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_sinks_weigh_in_as_a_key_without_a_value_in_parts_and_by_definition(heads, window):
    trees = TokenTrees.build([*some_trees().trees, response_tree([3] * 20, [[4] * 5, [5] * 11])])
    draw = torch.Generator().manual_seed(1)
    shapes = [(trees.num_tokens, h, 8) for h in (heads[0], heads[1], heads[1])] + [(heads[0],)]
    states = [torch.randn(shape, generator=draw, requires_grad=True) for shape in shapes]
    weights = torch.randn(shapes[0], generator=draw)
    results = []
    for attend in (
        lambda q, k, v, s: tree_attention(trees)(0, q, k, v, 0.3, window, s),
        lambda q, k, v, s: masked_attention(q, k, v, trees.strips, trees.visible(window)[:, None], 0.3, s),
    ):
        output = attend(*states)
        results.append([output, *torch.autograd.grad((output * weights).sum(), states)])
    for parted, defined in zip(*results, strict=True):
        assert relative_difference(parted, defined) < 2e-6


def test_a_sink_by_hand():
    # One token, which sees itself: score 0 beside a sink of score log 3 leaves it a quarter of its value.
    trees = TokenTrees.build([response_tree([], [[5]])])
    ones = torch.ones(1, 1, 2)
    output = tree_attention(trees)(0, 0 * ones, ones, ones, 1.0, None, torch.tensor([3.0]).log())
    torch.testing.assert_close(output, torch.full((1, 1, 2), 0.25))


def row_of(attend, **options):
    with attending(attend):
        mask = row_mask(batch_size=1, **options)
    return mask.trimtab_row.window


def test_windows_and_chunks_are_told_apart():
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    attend = tree_attention(some_trees())
    assert row_of(attend) is None
    assert row_of(attend, mask_function=sliding_window_causal_mask_function(4), local_size=4) == 4
    chunks = row_of(attend, mask_function=chunked_causal_mask_function(4, torch.zeros(1).long()), local_size=4)
    places = torch.arange(10)
    asking, seen = places[:, None], places[None]
    assert torch.equal(chunks(asking, seen), (asking // 4 == seen // 4) & (seen <= asking))


def states():
    module = torch.nn.Module()
    module.layer_idx = 0
    return module, *torch.randn(3, 1, 2, 4, 8).unbind()


@pytest.mark.parametrize(
    "given", [{"position_bias": torch.zeros(1)}, {"indices": [1]}, {"dropout": 0.1}, {"anything": 0}]
)
def test_what_is_not_computed_is_refused_by_name(given):
    with pytest.raises(EngineError, match=f"is given {next(iter(given))}"):
        row_attention(*states(), None, **given)


def test_a_mask_of_the_models_own_is_refused():
    with attending(tree_attention(some_trees())), pytest.raises(EngineError, match="a mask of its own"):
        row_attention(*states(), torch.zeros(1, 1, 4, 4))


def test_a_layer_that_attends_otherwise_is_noticed():
    model = causal("llama")
    model.set_attn_implementation(ROW_ATTENTION)
    layer = backbone(model).layers[1].self_attn
    layer.config = type(layer.config)(**layer.config.to_dict(), attn_implementation="eager")
    trees = some_trees()
    with pytest.raises(EngineError, match=r"in the layers \[0\], of 2"):
        row_states(backbone(model), trees.input_ids, trees.position_ids, tree_attention(trees))


def test_padded_rows_under_row_attention_have_sinks_and_caps_too():
    model = families.causal("gpt_oss")
    rows = torch.randint(3, families.VOCAB, (2, 12))
    with torch.no_grad():
        expected = model(input_ids=rows).logits
        model.set_attn_implementation(ROW_ATTENTION)
        torch.testing.assert_close(model(input_ids=rows).logits, expected, atol=1e-5, rtol=1e-5)
