"""What stands between two responses of one row, as tokens: an observation, and what the chat template writes around it.

A row is never tokenised again: the policy's tokens stay as they were sampled, and only what follows them is encoded.
Of a conversation that is all that the template writes behind the assistant's words: the end of its turn (left out where
the policy wrote it itself), the observation, and the beginning of its next turn."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrlhf.data.chat import Message, render
from jaxrlhf.data.encode import as_turns, encode_continuation, prompt_turns
from jaxrlhf.data.record_kinds import BadRecord
from jaxrlhf.data.tokenizer import eos_ids

Observation = str | Sequence[Message]
SAID = "The assistant said this."  # stands for a response
THOUGHT = f"<think>\nIt thought so.\n</think>\n\n{SAID}"


class Glue:
    """Encodes observations for one tokenizer.

    Args:
        chat: whether the data section ``chat`` is given: a plain-text prompt is then the user's turn.
        eos: ids that end a response; the tokenizer's own by default.
    """

    def __init__(self, tokenizer: Any, chat: bool, eos: Sequence[int] | None = None):
        self.tokenizer, self.eos = tokenizer, eos_ids(tokenizer) if eos is None else eos
        self.convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] = as_turns if chat else dict

    def messages(self, record: Mapping[str, Any]) -> list[Message] | None:
        """The conversation that the record asks the policy to go on with; None of plain text."""
        found = prompt_turns(self.convert(record))
        return None if found is None else list(found)

    def ids(self, record: Mapping[str, Any], observation: Observation, closed: bool) -> list[int]:
        """The tokens from the end of a response to the beginning of the next.

        Args:
            record: of the row's prompt.
            observation: a text (in a conversation the user's next turn), or messages.
            closed: whether the response ends with an EOS token; else the end of the turn is written here.

        Raises:
            BadRecord: the template refuses the messages, or there is none.
        """
        prompt = self.messages(record)
        if prompt is None:
            if not isinstance(observation, str):
                raise BadRecord(
                    "the observation is messages, and the prompt is plain text; expected a text, or data.chat"
                )
            return encode_continuation(observation, self.tokenizer)
        ids = encode_continuation(self.written(record, prompt, observation), self.tokenizer)
        return ids[self.end_of(ids) :] if closed else ids

    def written(self, record: Mapping[str, Any], prompt: Sequence[Message], observation: Observation) -> str:
        """What the template writes behind the assistant's words, in the text of the whole conversation."""
        more, tools, said = as_messages(observation), record.get("tools"), SAID
        while said in str([*prompt, *more, tools]):
            said += " And more."
        whole = render([*prompt, {"role": "assistant", "content": said}, *more], self.tokenizer, True, tools)
        _, found, after = whole.partition(said)
        if not found:
            raise BadRecord(f"the chat template of {self.tokenizer.name_or_path!r} does not write what was said before")
        return after

    def end_of(self, ids: Sequence[int]) -> int:
        """How many of the tokens end the assistant's turn: up to the first EOS, where only space is before it."""
        for at, token in enumerate(ids):
            if token in self.eos:
                return at + 1
            if self.tokenizer.decode([token]).strip():
                return 0
        return 0

    def rewrites(self, record: Mapping[str, Any]) -> str | None:
        """What to say where the template, given the whole conversation, writes earlier turns otherwise than a row has
        them; None where a row is what it writes."""
        prompt = self.messages(record)
        if prompt is None:
            return None
        tools = record.get("tools")
        before = render(prompt, self.tokenizer, True, tools)
        for said, what in ((SAID, "earlier turns"), (THOUGHT, "the thinking of earlier turns")):
            turn = [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
            once = render([*prompt, *turn], self.tokenizer, True, tools)
            twice = render([*prompt, *turn, *turn], self.tokenizer, True, tools)
            if not (follows(once, before, said) and follows(twice, once, said)):
                return (
                    f"environment: the chat template of {self.tokenizer.name_or_path!r} writes {what} otherwise once "
                    "more follow; rows keep what was sampled, so they are not what it writes of a whole conversation"
                )
        return None


def follows(text: str, before: str, said: str) -> bool:
    """Whether ``said`` comes behind ``before`` in the text, but for a space that some templates leave to the policy."""
    return text.startswith(before) and text[len(before) :].lstrip().startswith(said)


def as_messages(observation: Observation) -> list[Message]:
    """An observation as turns; a text is the user's."""
    return [{"role": "user", "content": observation}] if isinstance(observation, str) else list(observation)
