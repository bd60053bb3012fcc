"""LoRAX's replies to requests whose prompts are told of, or of several choices: never streamed."""

from frontend.calls import OneChoice, Part, mean_logprob
from frontend.exchange import HttpReply
from frontend.lorax_replies import LoraxShape


class LoraxChoices(OneChoice):
    """`best_of` and `decoder_input_details`: the choice whose tokens are the likeliest on average
    is the reply, and the others come with its details, the better the earlier."""

    def __init__(self, shape: LoraxShape) -> None:
        super().__init__(shape)
        self._lorax = shape

    def whole(self, parts: list[Part]) -> HttpReply:
        prompt = parts[0].prompt
        prefill = () if prompt is None else prompt.tokens
        return self._lorax.reply(sorted(parts, key=mean_logprob, reverse=True), prefill)
