"""Two processes on one card take the steps of one: numbers that go from one to the other, by gloo."""

import pytest
from on_gpu import ACCELERATOR, ON_GPU, or_skip

or_skip()

from one_card import ON_ONE_CARD, STRATEGIES
from parallel_fits import assert_same, of_stage, result, write_records
from parallel_processes import in_processes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_and_weights_are_those_of_one_process(strategy, tiny_model, tmp_path):
    if ON_GPU and strategy == "fsdp2":
        pytest.skip("the groups of a device mesh copy the options of gloo, which torch cannot (split_group, 2.11)")
    write_records(tmp_path)
    names = [name for name in ON_ONE_CARD if f", {strategy}, " in name]
    in_processes(names, str(tiny_model), tmp_path, timeout=90)
    for name in names:
        expected = of_stage(name.split(", ")[0], str(tiny_model), tmp_path, accelerator=ACCELERATOR)
        assert_same(result(tmp_path, name), expected, tolerance=1e-4)
