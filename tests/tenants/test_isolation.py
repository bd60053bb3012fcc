"""Random tenants, tokens and names: nobody is served, or told of, what is not theirs to read."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from frontend.adapters import scope_of
from pipeline.messages import FinishReason
from tests.frontend.fakes import make_adapter
from tests.scheduler.fake_worker import BASE as BASE_CONTENT
from tests.scheduler.fake_worker import reply
from tests.tenants.node import Node
from tests.tenants.sources import Place, Sources

TOKENS = ("hf_tokenOfAlice", "hf_tokenOfBob", "hf_tokenOfNobody")
ALICE, BOB, _ = TOKENS
READERS: dict[Place, frozenset[str] | None] = {
    ("hub", "acme/secret"): frozenset({ALICE}),
    ("hub", "acme/payroll"): frozenset({ALICE}),
    ("hub", "umbrella/virus"): frozenset({BOB}),
    ("hub", "joint/venture"): frozenset({ALICE, BOB}),
    ("hub", "open/weights"): None,
    ("local", "acme/payroll"): None,  # the operator's, of the same name
    ("local", "pirate"): None,
    ("s3", "s3://bucket/acme/secret"): None,
    ("http", "https://host.org/acme/secret"): frozenset({ALICE}),
}
HUB_PLACES = sorted(place for place in READERS if place[0] in ("hub", "http"))
LOCAL = [id for source, id in READERS if source == "local"]
PRIVATE = sorted({id for (_, id), readers in READERS.items() if readers is not None})
MAX_TOKENS = 7  # enough to tell the contents apart
PROMPT = tuple(range(1, 14))  # three blocks of four, and one token

WRITTEN = (
    "{}", "{}", "{}", "{}/", "{}@main", "{}@", "{}@v2", "./{}", "{}/.", "/{}", " {}", "{} ",
    "x/../{}", "{}\u200b", "\uff0f{}", "hub:{}",
)  # fmt: skip
names = st.builds(
    lambda id, written, upper: written.format(id.upper() if upper else id),
    st.sampled_from([*{id for _, id in READERS}, "bucket/acme/secret"]),
    st.sampled_from(WRITTEN),
    st.integers(0, 9).map(lambda one: one == 0),
)
adapters = st.one_of(
    st.builds(lambda name: {"adapter_id": name}, names),
    st.builds(
        lambda ids, strategy: {"merged_adapters": {"ids": ids, "merge_strategy": strategy}},
        st.lists(names, min_size=1, max_size=3),
        st.sampled_from(("linear", "cat")),
    ),
    st.just({}),
)
named_sources = st.sampled_from(
    ({}, {}, *({"adapter_source": source} for source in ("hub", "local", "s3", "http")))
)
tokens = st.sampled_from((None, "", *TOKENS))
bearers = st.sampled_from(("Bearer {}", "bearer   {} ", "Basic {}", "{}"))
prompts = st.builds(
    lambda common, rest: (*PROMPT[:common], *rest),
    st.sampled_from((0, 4, 8, len(PROMPT))),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
)


class Tenants(RuleBasedStateMachine):
    @initialize(
        revalidate=st.sampled_from((0.0, 4.0, 10.0)),
        remember=st.sampled_from((0.0, 3.0)),
        slots=st.integers(1, 6),
        rows=st.integers(1, 4),
    )
    def begin(self, revalidate: float, remember: float, slots: int, rows: int) -> None:
        self.folder = TemporaryDirectory()
        root = Path(self.folder.name).resolve()
        for id in LOCAL:
            make_adapter(root, id)
        self.revalidate, self.remember = revalidate, remember
        self.sources = Sources(READERS)
        self.node = Node(
            self.sources,
            [root],
            remember_seconds=remember,
            adapter_revalidate_seconds=revalidate,
            slots=slots,
            rows=rows,
            pool_bytes=1 << 20,
        )

    @rule(
        adapter=adapters,
        source=named_sources,
        api_token=tokens,
        bearer=tokens,
        scheme=bearers,
        prompt=prompts,
    )
    def ask(
        self,
        adapter: dict[str, Any],
        source: dict[str, str],
        api_token: str | None,
        bearer: str | None,
        scheme: str,
        prompt: tuple[int, ...],
    ) -> None:
        body_token = {} if api_token is None else {"api_token": api_token}
        authorization = None if bearer is None else scheme.format(bearer)
        mine = frozenset(token for token in (api_token, bearer) if token)
        parameters = {**adapter, **source, **body_token, "ignore_eos": True}
        self.node.submit(parameters, authorization, mine, prompt, MAX_TOKENS)

    @rule(place=st.sampled_from(HUB_PLACES), token=st.sampled_from(TOKENS), answered=st.booleans())
    def ask_plainly(self, place: Place, token: str, answered: bool) -> None:
        """Most names above lead nowhere; these find, and leave, adapters on the device."""
        self._ask_for(place, token)
        if answered:
            self.node.run()

    @precondition(lambda self: self.node.loader.fetches)
    @rule(data=st.data())
    def a_source_answers(self, data: st.DataObject) -> None:
        self.node.fetch(data.draw(st.integers(0, len(self.node.loader.fetches) - 1)))

    @precondition(lambda self: self.node.world.worker.steps)
    @rule(steps=st.integers(1, 12))
    def the_worker_steps(self, steps: int) -> None:
        for _ in range(steps):
            if self.node.world.worker.steps:
                self.node.step()

    @rule(seconds=st.sampled_from((0.5, 2.0, 5.0, 11.0)))
    def time_passes(self, seconds: float) -> None:
        self.node.wait(seconds)

    @rule(place=st.sampled_from(sorted(READERS)))
    def content_changes(self, place: Place) -> None:
        self.sources.change(place)

    @rule(
        place=st.sampled_from(HUB_PLACES),
        readers=st.sampled_from((None, *map(frozenset, ([], [ALICE], [BOB], [ALICE, BOB])))),
    )
    def access_changes(self, place: Place, readers: frozenset[str] | None) -> None:
        self.sources.allow(place, readers)

    @rule(down=st.booleans())
    def sources_go_down_or_come_back(self, down: bool) -> None:
        self.sources.down = down

    def teardown(self) -> None:
        if not hasattr(self, "node"):
            return
        try:
            self.node.run()
            self._check_answers()
            self._check_what_is_told()
            self._check_lists()
            self._check_each_gets_theirs()
        finally:
            self.folder.cleanup()

    def _ask_for(self, place: Place, token: str | None) -> int:
        source, id = place
        parameters = {"adapter_id": id, "adapter_source": source, "ignore_eos": True}
        mine, bearer = (frozenset({token}), f"Bearer {token}") if token else (frozenset(), None)
        request_id = self.node.submit(parameters, bearer, mine, PROMPT, MAX_TOKENS)
        assert request_id is not None
        return request_id

    # --- what must hold ---

    def _check_answers(self) -> None:
        """Each answer is made of contents that its own request named and its tokens may read."""
        world = self.node.world
        for request_id, asked in self.node.asked.items():
            end = world.finished[request_id]
            self._check_cached(request_id, end.usage.cached_tokens)
            if end.reason is FinishReason.ERROR:
                continue
            produced = world.tokens[request_id]
            finished = asked.at + end.usage.total_seconds
            could_be = self._contents(asked.parameters, asked.tokens, asked.at, finished)
            assert any(
                produced == reply(content, asked.prompt, asked.max_tokens, ignore_eos=True)
                for content in could_be
            ), f"{asked.parameters} was answered with what was not its own"

    def _contents(
        self, parameters: dict[str, Any], tokens: frozenset[str], at: float, finished: float
    ) -> Iterator[str]:
        """What may answer: contents as they were, for these tokens, since the last question."""
        if "merged_adapters" in parameters:
            ids = parameters["merged_adapters"]["ids"]
        else:
            ids = [parameters["adapter_id"]] if "adapter_id" in parameters else []
        readable = [
            [
                state.content
                for place in READERS
                if place[1].removeprefix("s3://") in id
                for state in self._states(place, at, finished)
                if state.lets(tokens)
            ]
            for id in ids
        ]
        return ("+".join(parts) or BASE_CONTENT for parts in product(*readable))

    def _states(self, place: Place, at: float, finished: float) -> list[Any]:
        """While its source is down, what everybody may read is served as it was."""
        states = self.sources.between(place, at - self.revalidate, finished)
        was_public = [one for one in self.sources.history[place] if one.readers is None]
        return [*states, *was_public]

    def _check_cached(self, request_id: int, cached_tokens: int) -> None:
        """KV comes from requests with the same adapter, of the same scope."""
        if not cached_tokens:
            return
        asked = self.node.asked[request_id]
        prefix = list(asked.prompt[:cached_tokens])
        assert any(
            [*other.prompt, *self.node.world.tokens[other_id]][:cached_tokens] == prefix
            for other_id, other in self.node.asked.items()
            if other_id != request_id and other.call.prompt.adapter == asked.call.prompt.adapter
        )

    def _check_what_is_told(self) -> None:
        """No reply has a secret in it, nor the name of a private adapter it does not ask for."""
        told = [
            (asked.parameters, body)
            for request_id, asked in self.node.asked.items()
            if (body := self.node.refusal(request_id)) is not None
        ]
        told += [(parameters, refused.body) for parameters, refused in self.node.refused]
        for parameters, body in told:
            text = body.decode()
            for token in TOKENS:
                assert token not in text
            for id in PRIVATE:
                assert id not in text or id in str(parameters)

    def _check_lists(self) -> None:
        """A list of models shows to each what was public, and what was answered to its token."""
        for token in (None, *TOKENS):
            for name in self.node.used.names(scope_of(token)):
                assert any(
                    any(state.readers is None for state in self.sources.history[place])
                    or any(
                        token in asked.tokens and name in str(asked.parameters)
                        for asked in self.node.asked.values()
                    )
                    for place in READERS
                    if place[1] == name
                )

    def _check_each_gets_theirs(self) -> None:
        """In the end each token reads exactly what it may, as it is now."""
        self.sources.down = False
        self.node.wait(self.remember + self.revalidate + 1)
        for (source, id), token in product(HUB_PLACES, (None, *TOKENS)):
            state = self.sources.history[source, id][-1]
            request_id = self._ask_for((source, id), token)
            self.node.run()
            failure = self.node.world.finished[request_id].failure
            assert (failure is None) == state.lets([token] if token else [])
            if failure is None:
                expected = reply(state.content, PROMPT, MAX_TOKENS, ignore_eos=True)
                assert self.node.world.tokens[request_id] == expected


Tenants.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestTenants = Tenants.TestCase
