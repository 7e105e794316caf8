"""Who may run now: the order of turns, the bound of the queue, and that none is lost whoever gives up."""

import asyncio

import pytest

from jhansi_runtime.api.admission import Admission
from jhansi_runtime.errors import BusyError


def within_seconds(work):
    """Run it; a turn that never comes is a failure."""
    asyncio.run(asyncio.wait_for(work, 10))


async def settle():
    """Let every task go on until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def queued(admission, count):
    """As many tasks that wait for a turn, in this order."""
    tasks = []
    for _ in range(count):
        tasks.append(asyncio.create_task(admission.enter()))
        await settle()
    return tasks


async def filled(at_once, queue, waiting):
    """An admission with every turn taken, and tasks that wait."""
    admission = Admission(at_once, queue)
    for _ in range(at_once):
        await admission.enter()
    return admission, await queued(admission, waiting)


def test_as_many_enter_at_once_as_may():
    async def body():
        admission, [waiting] = await filled(3, 1, 1)
        assert (admission.running, admission.waiting, waiting.done()) == (3, 1, False)
        admission.leave()
        await waiting
        assert (admission.running, admission.waiting) == (3, 0)

    within_seconds(body())


def test_turns_are_given_in_the_order_in_which_they_were_asked_for():
    async def body():
        admission, tasks = await filled(1, 4, 4)
        for number in range(4):
            admission.leave()
            await settle()
            assert [task.done() for task in tasks] == [True] * (number + 1) + [False] * (3 - number)

    within_seconds(body())


def test_nobody_overtakes_those_who_wait():
    async def body():
        admission, [first] = await filled(1, 2, 1)
        admission.leave()  # the turn is the first's, which has not run since
        second = asyncio.create_task(admission.enter())
        await settle()
        assert (first.done(), second.done(), admission.running) == (True, False, 1)
        admission.leave()
        await second

    within_seconds(body())


@pytest.mark.parametrize("queue", [0, 1, 3])
def test_beyond_the_queue_it_is_refused_and_changes_nothing(queue):
    async def body():
        admission, tasks = await filled(2, queue, queue)
        with pytest.raises(BusyError) as refused:
            await admission.enter()
        assert refused.value.retry_after > 0
        assert (admission.running, admission.waiting) == (2, queue)
        for _ in range(queue + 2):
            admission.leave()
        await asyncio.gather(*tasks)
        assert (admission.running, admission.waiting) == (0, 0)
        await admission.enter()  # and there is room again

    within_seconds(body())


def test_who_gives_up_while_waiting_leaves_the_queue():
    async def body():
        admission, [first, second, third] = await filled(1, 3, 3)
        second.cancel()
        await asyncio.wait([second])
        assert (admission.running, admission.waiting) == (1, 2)
        [fourth] = await queued(admission, 1)  # there is room for another
        admission.leave()
        await first
        admission.leave()
        await settle()
        assert (third.done(), fourth.done()) == (True, False)
        admission.leave()
        await fourth
        admission.leave()
        assert (admission.running, admission.waiting) == (0, 0)

    within_seconds(body())


def test_a_turn_that_comes_at_the_moment_it_is_given_up_goes_to_the_next():
    async def body():
        admission, [first, second] = await filled(1, 2, 2)
        admission.leave()
        first.cancel()  # it has the turn, and has not run since
        await asyncio.wait([first])
        assert first.cancelled()
        await asyncio.wait_for(second, 5)
        assert (admission.running, admission.waiting) == (1, 0)
        admission.leave()
        assert admission.running == 0

    within_seconds(body())


def test_a_turn_that_is_given_up_before_anybody_looked_is_passed_over():
    async def body():
        admission, [first, second] = await filled(1, 2, 2)
        first.cancel()
        admission.leave()  # the first is cancelled, and has not run since
        await asyncio.wait([first])
        await asyncio.wait_for(second, 5)
        assert (admission.running, admission.waiting) == (1, 0)

    within_seconds(body())


def test_everybody_giving_up_leaves_nothing_behind():
    async def body():
        admission, tasks = await filled(2, 8, 8)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        admission.leave()
        admission.leave()
        assert (admission.running, admission.waiting) == (0, 0)

    within_seconds(body())


def test_a_share_is_each_ones_own_and_is_given_back():
    admission = Admission(10, 10)
    with admission.share("key_a", 2), admission.share("key_a", 2):
        with pytest.raises(BusyError) as refused, admission.share("key_a", 2):
            pass
        assert refused.value.retry_after > 0
        with admission.share("key_b", 1), admission.share("", None), admission.share("", None):
            pass
    with pytest.raises(ValueError, match="of the test"), admission.share("key_a", 1):
        raise ValueError("of the test")
    with admission.share("key_a", 1):
        pass
