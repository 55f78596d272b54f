"""Chat templates of others, rendered within limits."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmodels.process.confined import Confined
from jaxmodels.process.texts import quoted

SECONDS = 5.0  # published templates take milliseconds
MEGABYTES = 500.0
LONGEST, GROWTH = 100_000, 10  # characters of a conversation; and for each of its messages and of the template
# Its process imports transformers, which takes seconds.
RENDERER = Confined("jaxmodels.text.tokenizer.untrusted.chat", seconds=60.0, megabytes=4_000.0)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Chat template that transformers renders in a process with limited time and memory; needs transformers.

    text: Jinja source. special: special tokens by name, such as bos_token. what: subject of errors.
    """

    text: str
    special: Mapping[str, str]
    what: str

    def render(self, messages: Sequence[Mapping[str, Any]], *, generation: bool = True) -> str:
        """Text of a conversation. generation: it ends with the beginning of an answer; else its last message goes on.

        Raises ValueError, of one line, for a template with an error, or one that takes more than SECONDS of processor
        time or MEGABYTES, or writes more characters than LONGEST and GROWTH allow.
        """
        given = len(self.text) + sum(len(str(value)) for message in messages for value in message.values())
        longest = LONGEST + GROWTH * given
        arguments = self.text, dict(self.special), list(messages), generation, longest
        try:
            text = RENDERER.call("render", *arguments, seconds=SECONDS, megabytes=MEGABYTES)
        except ValueError as error:
            raise ValueError(f"{self.what}: {quoted(str(error), 200)}") from None
        if isinstance(text, int):
            raise ValueError(f"{self.what}: it writes {text:,} characters; at most {longest:,}")
        return str(text)
