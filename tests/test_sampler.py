"""Sample order: every sample once per epoch, the same order from any window on."""

from hypothesis import given
from hypothesis import strategies as st

from data.sampler import EpochBatchSampler, Share, derive_seed

sizes = st.integers(1, 200)
batch_sizes = st.integers(1, 17)
seeds = st.integers(0, 2**31)
epochs = st.integers(0, 500)


@given(num_samples=sizes, batch_size=batch_sizes, seed=seeds, epoch=epochs)
def test_each_sample_comes_once_and_all_batches_but_the_last_are_full(
    num_samples: int, batch_size: int, seed: int, epoch: int
) -> None:
    sampler = EpochBatchSampler(num_samples, batch_size, seed)
    sampler.set_position(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert sorted(key.index for batch in batches for key in batch) == list(range(num_samples))
    assert {key.epoch for batch in batches for key in batch} == {epoch}


@given(num_samples=sizes, batch_size=batch_sizes, seed=seeds, epoch=epochs, data=st.data())
def test_starting_in_mid_epoch_gives_the_rest_of_the_same_order(
    num_samples: int, batch_size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    whole = EpochBatchSampler(num_samples, batch_size, seed)
    whole.set_position(epoch)
    first = data.draw(st.integers(0, len(whole)))
    rest = EpochBatchSampler(num_samples, batch_size, seed)
    rest.set_position(epoch, first)
    assert list(rest) == list(whole)[first:]


def test_order_differs_between_epochs_and_between_seeds() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochBatchSampler(50, 50, seed)
        sampler.set_position(epoch)
        return [key.index for key in next(iter(sampler))]

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
def test_derived_seeds_fit_torchs_generators_and_repeat(parts: list[int]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*parts)


def test_the_last_window_has_the_samples_that_are_left() -> None:
    sampler = EpochBatchSampler(num_samples=10, batch_size=2, seed=0, window_size=4)
    assert [sampler.samples_in(window) for window in range(3)] == [4, 4, 2]
    assert [sampler.batches_in(window) for window in range(3)] == [2, 2, 1]


def test_a_rank_that_a_short_window_leaves_nothing_gets_one_batch_to_run() -> None:
    """Every rank must take part in collectives: the last of four ranks has none of the last window's two samples."""
    share = Share(rank=3, world_size=4)
    sampler = EpochBatchSampler(num_samples=10, batch_size=2, seed=0, window_size=8, share=share)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [2, 1]
    assert len(batches) == len(sampler) == sum(sampler.batches_in(window) for window in range(2))
    first = EpochBatchSampler(num_samples=10, batch_size=2, seed=0, window_size=8, share=Share(0, 4))
    assert batches[1] == list(first)[1]
