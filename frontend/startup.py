"""LoRAX's /startup: whether the whole way from a prompt to a token works."""

from starlette.requests import Request

from frontend import lorax_replies, metrics
from frontend.calls import error_of
from frontend.downstream import Downstream
from frontend.exchange import RETRY, HttpReply
from frontend.processes import Processes
from pipeline.errors import RequestError
from pipeline.messages import Prompt, Sampling

PATH = "/startup"
PROBE = Prompt(
    request_id=0, arrived=0.0, text="Who?", sampling=Sampling(temperature=0.0), max_tokens=1
)


class Startup:
    """The endpoint: has one token made, in a place like that of any request."""

    def __init__(self, *, downstream: Downstream, processes: Processes) -> None:
        self._downstream = downstream
        self._processes = processes

    async def endpoint(self, request: Request) -> HttpReply:
        reply = await self._probe()
        metrics.REQUESTS.labels(PATH, reply.status).inc()
        return reply

    async def _probe(self) -> HttpReply:
        why = self._processes.waits_for()
        if why:
            return lorax_replies.unhealthy(why, RETRY)
        try:
            with self._downstream.start(PROBE, streamed=False) as reply:
                [part] = await reply.next()
        except RequestError as error:  # no place is free, or it drains
            return lorax_replies.refusal(error, streamed=False)
        failed = error_of(part.end)
        return HttpReply(200, b"", ()) if failed is None else lorax_replies.failed_startup(failed)
