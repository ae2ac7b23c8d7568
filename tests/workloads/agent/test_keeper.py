"""Whatever happens to Triton, the keeper brings the models back, and says what is missing until then."""

import numpy as np
import pytest

from workloads.agent.door import FakeTriton, TritonError
from workloads.agent.keeper import RETIRE_AFTER_S, Keeper
from workloads.agent.probing import Recorded
from workloads.bundle.probes import Probes
from workloads.contract.tensors import RANKER

OURS, OLD = "ranker-aaaaaaaaaaaa", "ranker-bbbbbbbbbbbb"
RECORDED = Recorded(
    Probes(
        {spec.name: np.zeros((40, *spec.shape), spec.dtype) for spec in RANKER.inputs},
        np.full((40, 1), 0.5, np.float32),
    ),
    limit=1e-4,
)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton({"probability": (1,)}, OURS, OLD)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keeper(triton: FakeTriton, clock: Clock) -> Keeper:
    return Keeper(triton, {OURS: RECORDED}, clock=clock)


def _did(triton: FakeTriton) -> list[str]:
    return [call for call, model in triton.calls if model == OURS]


async def test_nothing_is_ready_before_the_first_look(keeper: Keeper) -> None:
    assert keeper.missing


async def test_a_model_is_loaded_then_warmed_over_the_batch_sizes_then_ready(
    keeper: Keeper, triton: FakeTriton
) -> None:
    await keeper.step()
    assert _did(triton) == ["load", "infer:1", "infer:32", "infer:200", "infer:256"]
    assert keeper.missing == {}


async def test_a_model_that_is_well_is_left_alone(keeper: Keeper, triton: FakeTriton) -> None:
    for _ in range(5):
        await keeper.step()
    assert _did(triton).count("load") == keeper.loads == 1


async def test_a_model_that_was_there_before_us_is_loaded_once_more_for_its_newest_files(
    keeper: Keeper, triton: FakeTriton
) -> None:
    triton.ready.append(OURS)
    await keeper.step()
    assert _did(triton).count("load") == 1


async def test_a_restarted_triton_gets_the_model_again(keeper: Keeper, triton: FakeTriton) -> None:
    await keeper.step()
    triton.restart()
    await keeper.step()
    assert keeper.missing == {}
    assert keeper.loads == 2
    assert _did(triton).count("infer:200") == 2


async def test_a_triton_that_is_gone_is_missing_and_mended_when_it_returns(keeper: Keeper, triton: FakeTriton) -> None:
    await keeper.step()
    triton.live = False
    triton.restart()
    await keeper.step()
    assert keeper.missing == {"tritonserver": "does not answer"}
    triton.live = True
    await keeper.step()
    assert keeper.missing == {}


async def test_a_failed_load_is_missing_with_tritons_own_words_and_tried_again(
    keeper: Keeper, triton: FakeTriton
) -> None:
    triton.fault = "failed to load: out of memory"
    await keeper.step()
    assert keeper.missing == {OURS: "failed to load: out of memory"}
    triton.fault = None
    await keeper.step()
    assert keeper.missing == {}


async def test_a_model_that_answers_nonsense_is_not_ready(keeper: Keeper, triton: FakeTriton) -> None:
    triton.value = float("nan")
    await keeper.step()
    assert "not finite float32 [1, 1]" in keeper.missing[OURS]


async def test_a_model_that_does_not_answer_what_was_recorded_is_not_ready(keeper: Keeper, triton: FakeTriton) -> None:
    triton.value = 0.51
    await keeper.step()
    assert "0.01 from what was recorded" in keeper.missing[OURS]


async def test_a_model_that_somebody_is_bringing_in_is_not_unloaded(
    keeper: Keeper, triton: FakeTriton, clock: Clock
) -> None:
    await triton.load(OLD)
    keeper.spared.add(OLD)
    await keeper.step()
    clock.now += RETIRE_AFTER_S
    await keeper.step()
    assert OLD in triton.ready


async def test_a_model_with_another_output_is_not_ready() -> None:
    keeper = Keeper(FakeTriton({"logit": (1,)}, OURS), {OURS: RECORDED})
    await keeper.step()
    assert "answered nothing as 'probability'" in keeper.missing[OURS]


async def test_a_triton_that_dies_between_load_and_warm_up_is_noticed(
    keeper: Keeper, triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*_: object) -> dict[str, np.ndarray]:
        raise TritonError("connection reset")

    monkeypatch.setattr(triton, "infer", die)
    await keeper.step()
    assert keeper.missing == {OURS: "connection reset"}


async def test_another_bundles_model_is_unloaded_last_and_not_before_gateways_have_turned(
    keeper: Keeper, triton: FakeTriton, clock: Clock
) -> None:
    await triton.load(OLD)
    await keeper.step()
    clock.now += RETIRE_AFTER_S - 1
    await keeper.step()
    assert triton.ready == [OLD, OURS]
    clock.now += 1
    await keeper.step()
    assert triton.ready == [OURS]


async def test_nothing_is_unloaded_while_ours_is_not_there(keeper: Keeper, triton: FakeTriton, clock: Clock) -> None:
    await triton.load(OLD)
    triton.models.remove(OURS)
    for _ in range(3):
        await keeper.step()
        clock.now += RETIRE_AFTER_S
    assert triton.ready == [OLD]


async def test_an_interruption_starts_the_wait_for_unloading_anew(
    keeper: Keeper, triton: FakeTriton, clock: Clock
) -> None:
    await triton.load(OLD)
    await keeper.step()
    clock.now += RETIRE_AFTER_S - 1
    triton.ready.remove(OURS)
    triton.fault = "busy"
    await keeper.step()
    triton.fault = None
    await keeper.step()
    clock.now += 2
    await keeper.step()
    assert OLD in triton.ready
