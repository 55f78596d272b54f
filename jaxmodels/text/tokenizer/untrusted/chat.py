"""Chat templates as transformers renders them, in a child process of `process.confined`.

Jinja's sandbox keeps a template from code and files, not from loops that take days, nor from numbers and texts without
end, which one expression can make.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxmodels.text.tokenizer.special import STANDARD


def operations() -> Mapping[str, Callable[..., Any]]:
    """Operation `render`."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def render(
        template: str, special: Mapping[str, str], messages: list[Any], generation: bool, longest: int
    ) -> str | int:
        """Text of a conversation, or its length if it has more than `longest` characters, to send less.

        special: special tokens by name, such as bos_token.
        """
        standard = {name: special[name] for name in STANDARD if name in special}
        others = {name: token for name, token in special.items() if name not in standard}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), model_specific_special_tokens=others, **standard
        )
        found = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation,
            continue_final_message=not generation,
        )
        text = str(found)
        return text if len(text) <= longest else len(text)

    return {"render": render}
