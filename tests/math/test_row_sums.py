import pytest
import torch

from tests.engines import pretend
from trimtab.math.row_sums import add_to_rows, take_rows


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(64,), ()])
def test_rows_that_are_named_often_get_the_sum_and_the_same_one_every_time(two_threads, shape):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 7, (4000,), generator=draw)  # so few that every thread adds to each of them
    values = torch.randn(4000, *shape, generator=draw)
    start = torch.randn(9, *shape, generator=draw)
    found = []
    for _ in range(20):
        total = start.clone()
        add_to_rows(total, rows, values)
        found.append(total)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0][7:], start[7:])
    expected = start.double().index_add(0, rows, values.double())
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-4)


def test_rows_in_several_dimensions_and_none_at_all():
    total = torch.zeros(4, 2)
    add_to_rows(total, torch.tensor([[1, 3], [1, 0]]), torch.ones(2, 2, 2))
    assert total.tolist() == [[1, 1], [2, 2], [0, 0], [1, 1]]
    add_to_rows(total, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2))
    assert total.tolist() == [[1, 1], [2, 2], [0, 0], [1, 1]]


def test_rows_that_are_taken_twice_get_both_gradients():
    x = torch.arange(8.0).view(4, 2).requires_grad_()
    taken = take_rows(x, torch.tensor([3, 1, 3]))
    assert taken.tolist() == [[6, 7], [2, 3], [6, 7]]
    taken.backward(torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    assert x.grad.tolist() == [[0, 0], [3, 4], [0, 0], [6, 8]]


def test_on_a_device_rows_are_taken_by_the_operation_whose_gradients_add_in_one_order():
    """The backward pass of index_select does not on a GPU, where two equal updates then differed."""
    rows = torch.tensor([1, 1])
    assert take_rows(torch.ones(3, 2, requires_grad=True), rows).grad_fn.name() == "IndexSelectBackward0"
    with pretend.watched():
        x = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(3, 2))])
        (on_device,) = pretend.on_device(x).parameters()
        assert take_rows(on_device, pretend.Pretend(rows)).grad_fn.name() == "IndexBackward0"
