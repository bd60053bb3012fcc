"""What goes into a step: decode rows, chunks, rows and their order."""

from pipeline.messages import Step
from tests.scheduler.fake_worker import BASE, reply, unpack
from tests.scheduler.world import World


def chunks(step: Step) -> list[tuple[int, int, int]]:
    numbers = unpack(step.prefill)
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def test_two_steps_are_sent_before_any_tokens_are_known() -> None:
    world = World()
    world.submit(max_tokens=8)
    prefill, decode = world.worker.steps
    assert chunks(prefill) == [(0, 0, 3)]
    assert unpack(decode.decode_rows) == [0]
    assert world.core.next_work(0.0) is None


def test_no_row_is_decoded_beyond_its_length() -> None:
    world = World()
    world.submit(max_tokens=3)
    world.run()
    assert len(world.worker.run_steps) == 3


def test_the_surplus_row_of_an_ended_sequence_is_dropped_and_freed() -> None:
    world = World()
    prompt = next([n] for n in range(99) if reply(BASE, [n], 64)[1:2] == [0])
    first = world.submit(prompt, max_tokens=9, ignore_eos=False)
    second = world.submit([7], max_tokens=9)
    world.run()
    assert world.tokens[first] == reply(BASE, prompt, 9)
    assert world.tokens[second] == reply(BASE, [7], 9, ignore_eos=True)
    freed = [step.step_id for step in world.worker.run_steps if unpack(step.free_rows) == [0]]
    assert freed == [4]  # EOS came with step 2, while 3 was in flight


def test_a_row_can_be_freed_and_given_again_in_one_step() -> None:
    world = World(rows=1)
    world.submit([1], max_tokens=2)
    world.submit([2], max_tokens=2)
    world.run()
    step = world.worker.run_steps[2]
    assert unpack(step.free_rows) == [0]
    assert [new.row for new in step.new_rows] == [0]


def test_a_freed_row_alone_is_not_worth_a_step() -> None:
    world = World()
    world.submit(max_tokens=1)
    world.run()
    assert len(world.worker.run_steps) == 1


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget() -> None:
    world = World(step_tokens=16)
    request = world.submit(range(1, 41), max_tokens=2)
    world.run()
    assert [chunks(step) for step in world.worker.run_steps[:3]] == [
        [(0, 0, 16)],
        [(0, 16, 16)],
        [(0, 32, 8)],
    ]
    assert world.tokens[request] == reply(BASE, range(1, 41), 2, ignore_eos=True)


def test_a_chunk_has_at_most_the_tokens_that_the_settings_say() -> None:
    world = World(step_tokens=16, prefill_chunk_tokens=7)
    request = world.submit(range(1, 21), max_tokens=3)
    world.run()
    assert [chunks(step) for step in world.worker.run_steps[:3]] == [
        [(0, 0, 7)],
        [(0, 7, 7)],
        [(0, 14, 6)],
    ]
    assert world.tokens[request] == reply(BASE, range(1, 21), 3, ignore_eos=True)


def test_decode_rows_come_first_and_chunks_share_what_is_left_first_come_first_served() -> None:
    world = World(step_tokens=8)
    world.submit([1], max_tokens=9)
    world.submit([2] * 9, max_tokens=2)
    world.submit([3] * 9, max_tokens=2)
    world.step()
    world.step()
    third, fourth = world.worker.steps
    assert unpack(third.decode_rows) == [0]
    assert chunks(third) == [(1, 0, 7)]
    assert unpack(fourth.decode_rows) == [0]
    assert chunks(fourth) == [(1, 7, 2), (2, 0, 5)]


def test_no_more_sequences_run_than_there_are_rows() -> None:
    world = World(rows=2)
    for number in range(5):
        world.submit([number], max_tokens=4)
    world.step()
    world.step()
    assert world.core.figures().requests_running == 2
    assert world.core.figures().requests_waiting == 3
    world.run()
    assert len(world.finished) == 5


def test_blocks_are_added_as_a_reply_grows() -> None:
    world = World(block_tokens=4)
    world.submit([1, 2, 3], max_tokens=7)
    world.run()
    grown = [step.step_id for step in world.worker.run_steps if step.blocks]
    assert grown == [3, 7]  # positions 4 and 8 are fed there


def test_mixed_requests_give_what_each_gives_alone() -> None:
    world = World(rows=3, step_tokens=11, prefill_chunk_tokens=7)
    prompts = [[n, *range(n)] for n in (1, 30, 8, 17, 2)]
    requests = [world.submit(prompt, max_tokens=12) for prompt in prompts]
    world.run()
    for request, prompt in zip(requests, prompts, strict=True):
        assert world.tokens[request] == reply(BASE, prompt, 12, ignore_eos=True)
