"""The engine without HTTP: whose turn it is, who is turned away, and what survives a failure."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from inference.engine import FAILURES_BEFORE_UNHEALTHY, Engine
from inference.errors import AdapterGone, Overloaded, RequestFailed
from inference.submission import Submission
from sdft_engine.generation import DecodingBatch
from sdft_engine.lora import LoraShape
from sdft_engine.model import LanguageModel, load_base_model
from sdft_engine.sampling import Decoding, SamplingParams
from tests.inference.serving import held


@pytest.fixture
def model(tiny_model_dir: Path) -> LanguageModel:
    return load_base_model(tiny_model_dir, device="cpu", dtype="float32")


@contextmanager
def running(model: LanguageModel, **options: float) -> Iterator[Engine]:
    engine = Engine(model, **options)  # type: ignore[arg-type]
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def submission(count: int = 1, length: int = 5, adapter: str | None = None) -> Submission:
    params = SamplingParams(max_new_tokens=length, temperature=0)
    return Submission([Decoding([70, 71, 72], params, adapter) for _ in range(count)])


async def token_ids(engine: Engine, asked: Submission) -> list[list[int]]:
    engine.submit(asked)
    answers: list[list[int]] = [[] for _ in asked.sequences]
    async for tokens in asked.tokens():
        for token in tokens:
            answers[token.index].append(token.token_id)
    return answers


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(12_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("waited too long")


def widths_of(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    widths: list[int] = []
    logits = model.logits

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        widths.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(model, "logits", watched)
    return widths


def run(work: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


def test_no_more_than_max_batch_are_decoded_together(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = widths_of(model, monkeypatch)

    async def work() -> None:
        with running(model, max_batch=3) as engine:
            answers = await asyncio.gather(*(token_ids(engine, submission(count=2)) for _ in range(4)))
            assert {tuple(ids) for answer in answers for ids in answer} == {tuple(answers[0][0])}
            assert len(answers[0][0]) == 5
            assert engine.load == (0, 0)

    run(work())
    assert max(widths) == 3


def test_a_request_for_many_answers_does_not_starve_a_later_one(model: LanguageModel) -> None:
    async def work() -> None:
        with running(model, max_batch=1) as engine:
            many, one = submission(count=20), submission()
            with held(engine):
                tasks = [asyncio.create_task(token_ids(engine, asked)) for asked in (many, one)]
                await eventually(lambda: engine.load == (0, 21))
            await tasks[1]
            assert sum(sequence.finish_reason is not None for sequence in many.sequences) <= 2
            assert len(await tasks[0]) == 20

    run(work())


def test_a_client_that_leaves_in_the_middle_of_a_step_harms_nobody(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapter may leave with it: what is still decoded with one that is gone would fail everybody's answers."""
    step = DecodingBatch.step

    async def work() -> None:
        left, others = submission(length=300, adapter="leaving"), submission(length=100)

        def left_at_its_end(batch: DecodingBatch) -> None:
            step(batch)
            if left.sequences[0] in batch.active:
                left.cancel()

        monkeypatch.setattr(DecodingBatch, "step", left_at_its_end)
        with running(model) as engine:
            await asyncio.wrap_future(engine.call(lambda: model.adapters.add("leaving", LoraShape(2, 4), trainable=False)))
            with held(engine):
                engine.submit(left)
                task = asyncio.create_task(token_ids(engine, others))
                await eventually(lambda: engine.load == (0, 2))
            await eventually(lambda: left.ended)
            await asyncio.wrap_future(engine.remove_adapter("leaving", lambda: model.adapters.remove("leaving")))
            assert len((await task)[0]) == 100
            assert len(left.sequences[0].token_ids) == 2, "nobody waits for the rest"

    run(work())


def test_newcomers_join_answers_on_their_way(model: LanguageModel) -> None:
    async def work() -> None:
        with running(model) as engine:
            long, short = submission(length=400), submission(length=3)
            engine.submit(long)
            await eventually(lambda: len(long.sequences[0].token_ids) > 3)
            await token_ids(engine, short)
            assert long.sequences[0].finish_reason is None

    run(work())


def test_a_full_queue_turns_requests_away_and_empties_again(model: LanguageModel) -> None:
    async def work() -> None:
        with running(model, max_waiting=3) as engine:
            first = submission(count=3)
            with held(engine):
                engine.submit(first)
                with pytest.raises(Overloaded, match="3 answers are waiting"):
                    engine.submit(submission())
            await eventually(lambda: first.ended)
            assert len(await token_ids(engine, submission(count=9))) == 9  # an empty queue takes a large request

    run(work())


def test_cancelled_answers_free_their_places(model: LanguageModel) -> None:
    async def work() -> None:
        with running(model, max_batch=1) as engine:
            blocking, waiting = submission(length=400), submission(count=2)
            engine.submit(blocking)
            engine.submit(waiting)
            await eventually(lambda: engine.load == (1, 2))
            waiting.cancel(0)
            await eventually(lambda: engine.load == (1, 1))
            blocking.cancel()
            await eventually(lambda: waiting.ended)
            assert len(blocking.sequences[0].token_ids) < 400
            assert waiting.sequences[0].token_ids == []
            assert engine.load == (0, 0)

    run(work())


def test_leaving_the_tokens_early_cancels(model: LanguageModel) -> None:
    async def work() -> None:
        with running(model) as engine:
            asked = submission(length=400)
            engine.submit(asked)
            tokens = asked.tokens()
            await anext(tokens)
            await tokens.aclose()
            await eventually(lambda: engine.load == (0, 0))
            assert asked.sequences[0].finish_reason is None

    run(work())


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with running(model, max_batch=2) as engine:
            expected = await token_ids(engine, submission())
            asked = [submission(length=300), submission(length=300), submission()]
            for one in asked:
                engine.submit(one)
            await eventually(lambda: len(asked[1].sequences[0].token_ids) > 2)
            with monkeypatch.context() as patch:
                patch.setattr(model, "logits", broken_once(model))
                for one in asked[:2]:
                    with pytest.raises(RequestFailed, match="failed while answering"):
                        async for _ in one.tokens():
                            pass
            await eventually(lambda: asked[2].ended)
            assert [asked[2].sequences[0].token_ids] == expected
            assert engine.healthy

    run(work())


def broken_once(model: LanguageModel) -> Callable[[torch.Tensor], torch.Tensor]:
    logits, failures = model.logits, [RuntimeError("out of memory")]

    def fail_once(hidden: torch.Tensor) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return logits(hidden)

    return fail_once


def test_a_failing_prefill_spares_the_answers_on_their_way(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with running(model) as engine:
            alone = await token_ids(engine, submission(length=60))
            long, doomed = submission(length=60), submission()
            with held(engine):
                engine.submit(long)
            await eventually(lambda: len(long.sequences[0].token_ids) > 2)
            with monkeypatch.context() as patch:
                with held(engine):
                    engine.submit(doomed)
                    patch.setattr(model, "logits", broken_once(model))
                with pytest.raises(RequestFailed):
                    async for _ in doomed.tokens():
                        pass
            await eventually(lambda: long.ended)
            assert not long.failed
            assert [long.sequences[0].token_ids] == alone

    run(work())


def test_failure_upon_failure_makes_the_engine_unhealthy(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with running(model) as engine:
            monkeypatch.setattr(model, "logits", lambda hidden: hidden.no_such_thing)
            for attempt in range(FAILURES_BEFORE_UNHEALTHY):
                assert engine.healthy, attempt
                with pytest.raises(RequestFailed):
                    await token_ids(engine, submission())
            assert not engine.healthy

    run(work())


def test_an_adapter_that_is_gone_is_never_answered_by_the_base(model: LanguageModel) -> None:
    async def work() -> None:
        with running(model) as engine:
            with pytest.raises(AdapterGone):
                await token_ids(engine, submission(adapter="served_9"))
            assert len(await token_ids(engine, submission())) == 1

    run(work())


def test_stopping_fails_what_is_left(model: LanguageModel) -> None:
    async def work() -> None:
        with running(model, max_batch=1) as engine:
            answering, waiting = submission(length=400), submission()
            engine.submit(answering)
            engine.submit(waiting)
            await eventually(lambda: engine.load == (1, 1))
            await asyncio.to_thread(engine.stop)
            assert not engine.healthy
            for asked in (answering, waiting):
                with pytest.raises(Overloaded, match="stopping"):
                    async for _ in asked.tokens():
                        pass
            with pytest.raises(Overloaded):
                engine.submit(submission())
            with pytest.raises(Overloaded):
                engine.call(lambda: None)

    run(work())


def test_a_task_fails_alone(model: LanguageModel) -> None:
    def fail() -> None:
        raise ValueError("of its own")

    async def work() -> None:
        with running(model) as engine:
            with pytest.raises(ValueError, match="of its own"):
                await asyncio.wrap_future(engine.call(fail))
            assert await asyncio.wrap_future(engine.call(lambda: 3)) == 3

    run(work())
