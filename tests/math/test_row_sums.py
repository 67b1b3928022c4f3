import pytest
import torch

from trimtab.math.row_sums import add_to_rows


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
