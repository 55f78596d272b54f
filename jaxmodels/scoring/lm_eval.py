"""The model type "jaxmodels" of lm-evaluation-harness (lm-eval 0.4), and the command `jaxmodels lm-eval`.

    python -m lm_eval --model jaxmodels --model_args source=FOLDER,batch_size=16 --tasks lambada_openai

Contexts, continuations and windows are those of lm-eval's own Hugging Face model, `HFLM`, so that the results are equal
to rounding.
"""

import argparse
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.convert.open import open_source
from jaxmodels.generate import generate
from jaxmodels.generate.sampling import integer
from jaxmodels.process import lm_eval as registration
from jaxmodels.process.arguments import Parser, errors_escaped
from jaxmodels.process.extras import require
from jaxmodels.process.programs import run
from jaxmodels.process.streams import records_escaped
from jaxmodels.process.texts import quoted
from jaxmodels.protocols import tell_left_out
from jaxmodels.scoring.documents import checked_vocabulary, default_window
from jaxmodels.scoring.here import guarded
from jaxmodels.scoring.likelihood import loglikelihood
from jaxmodels.scoring.rows import padded_length
from jaxmodels.scoring.special import chat_template, special_ids
from jaxmodels.scoring.templates import ChatTemplate
from jaxmodels.text import TokenizerFile

require("eval", "lm_eval")  # before the imports from it, which would fail without naming the extra

from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string  # noqa: E402
from tqdm import tqdm  # noqa: E402

PROGRAM = "jaxmodels lm-eval"
EXAMPLES = """\
examples:
  jaxmodels lm-eval run --model_args source=EleutherAI/pythia-70m --tasks lambada_openai --batch_size 16
  jaxmodels lm-eval run --model_args source=runs/mine,max_length=512 --include_path tasks --tasks mine
  jaxmodels lm-eval ls tasks

source is whatever `jaxmodels.load` takes. Further arguments of --model_args: revision, tokenizer, experiment, dtype,
batch_size, max_length, max_gen_toks, prefix_token_id, add_bos_token, seed.
`python -m lm_eval --model jaxmodels` has the same results, without this command's
checks of the current folder (docs/security.md). `jaxmodels lm-eval run --help` lists lm-eval's own arguments.
"""
CHUNK = 512  # requests between two updates of the progress bar and of lm-eval's cache
FIRST_TOKENS = 32  # written before the stop sequences are first looked for; then twice as many, and so on

# Generation settings of tasks that `generate` has under the same name; further ones are refused.
SETTINGS = {"top_k", "top_p", "min_p", "repetition_penalty"}

# In an argument of the command line: the flag, or an argument of a model, also in JSON.
TRUSTED = re.compile(r"""^--trust_remote_code$|\btrust_remote_code["']?\s*[=:]\s*(True|true)\b""")

TokenRequest = tuple[Any, list[int], list[int]]


class JaxModelsLM(TemplateLM):
    """Language model of this project for lm-eval.

    source: a folder that `jaxmodels.load` reads, or a Hub id. revision: of a Hub id. tokenizer: a tokenizer.json or
    vocabulary.json; default the source's own. experiment: module of a run's own script, if it is needed. dtype: of the
    weights; "auto" as they are stored, but float32 for 16-bit ones on a CPU. batch_size: rows, or
    "auto". max_length: most tokens that the model reads; default its max_len, but at most 4,096. max_gen_toks: most
    tokens to write, if a task does not say. prefix_token_id: context of texts without one; default the bos or else the
    eos token. add_bos_token: whether the tokenizer adds special tokens; default as it is stored. seed: of sampling.

    Raises ValueError if the source or a setting is bad, and for a run whose model reads more than tokens: lm-eval has
    nothing else to give it.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        revision: str | None = None,
        tokenizer: str | None = None,
        experiment: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
        **others: Any,
    ):
        super().__init__()
        ignored = ("device", "max_batch_size", "trust_remote_code")  # set by lm-eval's command line
        unknown = sorted(others.keys() - set(ignored))
        if unknown or source is None:
            names = [name for name in inspect.signature(JaxModelsLM).parameters if name != "others"]
            wrong = f"unknown {', '.join(unknown)}" if unknown else "source is missing"
            raise ValueError(f"model_args: {wrong}; arguments are {', '.join(names)}")
        opened = open_source(source, revision=revision)
        if opened.kind == "run":
            from jaxmodels.training.runs.folder import check_reads_tokens_alone

            check_reads_tokens_alone(opened.folder, experiment, opened.model_name)
        elif experiment is not None:
            raise ValueError(f"experiment={experiment!r} is for training runs; {opened.name} is not one")
        self.name = opened.name
        self.vocabulary = opened.vocabulary(tokenizer)
        self.files = dict(opened.companions.files)
        ids = opened.companions.token_ids
        named = {"bos": ids.bos, "eos": ids.eos[0] if ids.eos else None}
        self.special = special_ids(self.files, named, self.vocabulary, opened.settings.get("n_vocab"), self.name)
        self.add_bos_token, self.generated = add_bos_token, 0
        self.batch_size = parsed_batch_size(batch_size)
        self.seed, self.max_gen_toks = integer("seed", seed, 0), integer("max_gen_toks", max_gen_toks)
        self.given_prefix = None if prefix_token_id is None else integer("prefix_token_id", prefix_token_id, 0)
        given_length = None if max_length is None else integer("max_length", max_length)
        self.dtype = None if dtype == "auto" else dtype
        self.model = opened.model(dtype=self.dtype or opened.compute_dtype("dtype=…"))
        tell_left_out(self.model, self.name)
        self.max_length = given_length or default_window(self.model)
        if self.given_prefix is not None and self.given_prefix >= (n := checked_vocabulary(self.model, None)):
            raise ValueError(f"prefix_token_id={self.given_prefix} must be below the model's {n} tokens")

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "JaxModelsLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "JaxModelsLM":
        # lm-eval passes the command line's batch size, 1 by default, besides that of model_args.
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **arg_dict})

    @property
    def eot_token_id(self) -> int:
        for name in ("eos", "bos"):
            token = self.special[name]
            if token is not None:
                return token
        raise ValueError(f"{self.name} names neither an eos nor a bos token; pass prefix_token_id=ID in model_args")

    @property
    def prefix_token_id(self) -> int:
        if self.given_prefix is not None:
            return self.given_prefix
        return self.eot_token_id if self.special["bos"] is None else self.special["bos"]

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode as HFLM: special tokens as the tokenizer adds them, unless the text begins with the prefix token."""
        if not isinstance(self.vocabulary, TokenizerFile):
            return self.vocabulary.encode(string).tolist()
        if add_special_tokens is None:
            add_special_tokens = True if self.add_bos_token is None else self.add_bos_token
            if self.has_prefix and has_bos_prefix(string, self.tok_decode([self.prefix_token_id], False)):
                add_special_tokens = False
        ids: list[int] = self.vocabulary.encode(string, special=add_special_tokens).tolist()
        bos = self.special["bos"] if self.add_bos_token and add_special_tokens else None
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    @property
    def has_prefix(self) -> bool:
        return any(i is not None for i in (self.given_prefix, self.special["bos"], self.special["eos"]))

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.vocabulary.decode(np.asarray(tokens, np.int64), skip_special=skip_special_tokens)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        for context, continuation in (request.args for request in requests):
            if not context and not self.tok_encode(continuation, add_special_tokens=False):
                raise self.unscorable(continuation)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for pair, _, continuation in requests:
            if pair is not None and not continuation:  # its probability would be 1
                raise self.unscorable(pair[1])
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Equal beginnings side by side, so that requests with the same input are computed once.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1] + requests[i][2]), requests[i][1]))
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for at in range(0, len(order), CHUNK):
                chosen = order[at : at + CHUNK]
                found = loglikelihood(
                    self.model,
                    [requests[i][1] for i in chosen],
                    [requests[i][2] for i in chosen],
                    max_length=self.max_length,
                    batch_size=self.batch_size,
                )
                for i, likelihood in zip(chosen, found, strict=True):
                    answers[i] = (likelihood.log_prob, likelihood.greedy)
                    if requests[i][0] is not None:  # None: a window of loglikelihood_rolling
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(chosen))
        return answers

    def unscorable(self, continuation: str) -> ValueError:
        return ValueError(f"{self.name}: the continuation {quoted(continuation)} has no tokens of its own")

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows: list[TokenRequest] = []
        counts = []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += own
            counts.append(len(own))
        found = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum((next(found)[0] for _ in range(n)), 0.0) for n in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        arguments = [request.args for request in requests]
        contexts = [self.tok_encode(context) for context, _ in arguments]
        groups: dict[str, list[int]] = {}  # requests with equal settings
        for i, (_, settings) in enumerate(arguments):
            groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(i)
        texts = [""] * len(arguments)
        with tqdm(total=len(arguments), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for group in groups.values():
                group.sort(key=lambda i: -len(contexts[i]))
                rows = self.batch_size or 16
                for at in range(0, len(group), rows):
                    chosen = group[at : at + rows]
                    settings = arguments[chosen[0]][1]
                    written = self.continuations([contexts[i] for i in chosen], settings)
                    for i, text in zip(chosen, written, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", arguments[i], text)
                    bar.update(len(chosen))
        return texts

    def continuations(self, contexts: Sequence[list[int]], settings: dict[str, Any]) -> list[str]:
        """Continue contexts with lm-eval's generation settings, up to a stop sequence; raises ValueError as `sampler`.

        Stop sequences are texts, which may end inside a token. They are looked for after 32 tokens, 64 more, and so on;
        the rows without one go on from their text so far.
        """
        chosen: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        eos = self.special["eos"]
        end = None if eos is None else self.tok_decode([eos], False)
        until = handle_stop_sequences(chosen.pop("until"), eos=end)
        most = int(chosen.pop("max_gen_toks"))
        if not 0 < most < self.max_length:
            raise ValueError(f"max_gen_toks={most} must be from 1 to max_length - 1 = {self.max_length - 1}")
        write, stops = self.sampler(chosen), {i for i in (eos,) if i is not None}
        contexts = [context[most - self.max_length :] for context in contexts]
        if not all(contexts):
            contexts = [context or [self.prefix_token_id] for context in contexts]
        written: list[list[int]] = [[] for _ in contexts]
        texts = [""] * len(contexts)
        going, step, done = list(range(len(contexts))), FIRST_TOKENS, 0
        while going:
            step = min(step, most - done)
            new = write([contexts[i] + written[i] for i in going], step, tuple(stops))
            for i, tokens in zip(going, new, strict=True):
                stop = next((k for k, token in enumerate(tokens) if token in stops), None)
                written[i] += tokens if stop is None else tokens[: stop + 1]
                decoded = self.tok_decode(written[i])
                texts[i] = postprocess_generated_text(decoded, until, None)
            done, step = done + step, 2 * step
            going = [
                i
                for i in going
                if done < most and written[i][-1] not in stops and texts[i] == self.tok_decode(written[i])
            ]
        return texts

    def sampler(self, settings: dict[str, Any]) -> Callable[[list[list[int]], int, tuple[int, ...]], list[list[int]]]:
        """Function of prompts, a number of tokens and stop ids to new tokens, with left padding.

        Raises ValueError, listing those that are known, for a setting that `jaxmodels.generate` does not have.
        """
        sampled = settings.pop("do_sample", False)
        given = float(settings.pop("temperature", 1.0))
        temperature = given if sampled else 0.0
        if settings.get("num_beams") == 1:  # as here
            del settings["num_beams"]
        settings.pop("use_cache", None)
        known = SETTINGS & inspect.signature(generate).parameters.keys()
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(
                f"generation settings {', '.join(unknown)} are not supported; supported: do_sample, "
                f"temperature, {', '.join(sorted(known))}"
            )
        if not temperature:
            settings = {name: value for name, value in settings.items() if name not in ("top_k", "top_p", "min_p")}
        if hasattr(self.model, "unstacked"):
            self.model = self.model.unstacked()  # once, not in every call

        def write(prompts: list[list[int]], n: int, stops: tuple[int, ...]) -> list[list[int]]:
            # Each shape is compiled: few lengths and numbers of rows. The rows that are added repeat the last.
            length = max(map(len, prompts))
            length = max(length, min(padded_length(length), self.max_length - n))
            asked, rows = len(prompts), 1 << (len(prompts) - 1).bit_length()
            prompts = [*prompts, *[prompts[-1]] * (rows - asked)]
            ids = np.zeros((rows, length), np.int32)
            for row, prompt in zip(ids, prompts, strict=True):
                row[length - len(prompt) :] = prompt
            start = np.array([length - len(prompt) for prompt in prompts], np.int32)
            key = jax.random.fold_in(jax.random.key(self.seed), self.generated)
            self.generated += 1
            new = generate(
                self.model,
                jnp.asarray(ids if self.model.sequence_axis else ids.T),
                n,
                temperature=temperature,
                stop_tokens=stops,
                start=jnp.asarray(start) if start.any() else None,
                dtype=self.dtype,
                rng=key if temperature else None,
                **settings,
            )
            return np.asarray(new if self.model.sequence_axis else new.T)[:asked].tolist()

        return write

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Template of the source, for lm-eval's record; None if none is asked for."""
        return self.template.text if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as one text by the source's chat template; needs transformers."""
        return self.template.render(chat_history, generation=add_generation_prompt)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The source's chat template."""
        require("eval", "transformers")
        return chat_template(self.files, self.vocabulary, self.name)


def parsed_batch_size(value: int | str) -> int | None:
    """Number of rows; None for "auto". Raises ValueError for another value."""
    if str(value).startswith("auto"):
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"batch_size={value} must be an integer of at least 1, or auto")
    return int(value)


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Parser of the help text; lm-eval parses the arguments."""
    arguments = Parser(
        prog=prog,
        usage=f"{prog} [-h] [run | ls | validate] [ARGUMENTS OF lm-eval]",
        description="Run lm-evaluation-harness with the model type jaxmodels, which is the default of --model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run lm-eval's command line with the model type registered, and selected by default; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def harness() -> None:
        if not arguments or arguments[0] in ("-h", "--help"):
            parser(prog).print_help()
            return
        given = Parser(add_help=False, allow_abbrev=False)
        given.add_argument("--model", "-M")
        if arguments[0] == "run" or arguments[0].startswith("-"):
            options = [*arguments] if arguments[0] == "run" else ["run", *arguments]
            if given.parse_known_args(options)[0].model is None:
                options[1:1] = ["--model", registration.NAME]
        else:
            options = arguments
        from lm_eval.__main__ import cli_evaluate

        sys.argv = [prog, *options]
        code_allowed = any(TRUSTED.search(argument) for argument in options)
        with errors_escaped(), records_escaped(), guarded(code_allowed=code_allowed):
            cli_evaluate()

    return run(harness, prog)


registration.register()

if __name__ == "__main__":
    sys.exit(main())
