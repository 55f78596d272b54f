"""Special tokens and chat templates in the files of others."""

import json

import pytest

from jaxmodels.convert.companions import files_in
from jaxmodels.scoring.special import chat_template, special_ids, special_tokens_of
from jaxmodels.text import TokenizerFile
from tests.jaxmodels.tokenizer import byte_level_tokenizer

IDS = {"bos": 7, "eos": None}


@pytest.fixture
def folder(tmp_path):
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def ids_of(folder, n_vocab: int | None = 300) -> dict[str, int | None]:
    vocabulary = TokenizerFile.read(folder / "tokenizer.json")
    return special_ids(files_in(folder), IDS, vocabulary, n_vocab, str(folder))


def test_the_tokenizers_token_is_before_the_configurations_id(folder):
    assert ids_of(folder) == IDS
    write(folder, "special_tokens_map.json", {"bos_token": "a", "eos_token": {"content": "<|endoftext|>"}})
    known = TokenizerFile.read(folder / "tokenizer.json").tokenizer.token_to_id
    assert ids_of(folder) == {"bos": known("a"), "eos": 0}
    write(folder, "tokenizer_config.json", {"bos_token": "e", "eos_token": "e"})
    assert ids_of(folder) == {"bos": known("a"), "eos": 0}
    write(folder, "tokenizer_config.json", {"bos_token": None, "eos_token": "no token", "added_tokens_decoder": {}})
    assert ids_of(folder, None) == IDS | {"eos": 300}  # transformers adds it to the tokenizer


@pytest.mark.parametrize("value", [5, True, ["a"], {}, {"content": 5}, {"content": None, "id": 1}, 1e400])
@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_token_of_another_type_is_refused(folder, name, key, value):
    write(folder, name, {key: value})
    with pytest.raises(ValueError, match=rf"{name} has {key}=") as error:
        special_tokens_of(files_in(folder))
    assert "\n" not in str(error.value)


def test_an_id_beyond_the_models_vocabulary_is_left_out_with_a_line(folder):
    with pytest.warns(UserWarning, match=rf"{folder}: the bos token 7 is ignored: the model has 5 tokens"):
        assert ids_of(folder, 5) == {"bos": None, "eos": None}
    assert ids_of(folder, None) == IDS


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "has no chat template"),
        ({"chat_template": None}, "has no chat template"),
        ({"chat_template": [{"name": "default"}, "a"]}, r"tokenizer_config\.json has chat_template="),
        ({"chat_template": [{"name": "tool", "template": "a"}]}, r"chat_template without 'default', but \['tool'\]"),
        ({"chat_template": {"default": 5}}, r"tokenizer_config\.json has chat_template=5"),
        ({"chat_template": 5}, r"tokenizer_config\.json has chat_template=5; expected a string"),
        ({"chat_template": "a", "bos_token": 5}, r"tokenizer_config\.json has bos_token=5"),
        ([], r"tokenizer_config\.json"),
    ],
)
def test_a_chat_template_of_another_form_is_refused(folder, settings, said):
    vocabulary = TokenizerFile.read(folder / "tokenizer.json")
    write(folder, "tokenizer_config.json", settings)
    with pytest.raises(ValueError, match=said):
        chat_template(files_in(folder), vocabulary, str(folder))


@pytest.mark.parametrize("settings", [None, "list", "object"])
@pytest.mark.parametrize("written", [(), ("",), ("default",), ("tool",), ("", "default", "tool")], ids="+".join)
def test_the_default_of_several_templates_is_that_of_transformers(folder, settings, written):
    transformers = pytest.importorskip("transformers")
    named = {"tool": "tool of settings", "default": "settings"}
    several = {"list": [{"name": name, "template": text} for name, text in named.items()], "object": named}
    write(folder, "tokenizer_config.json", {"chat_template": several[settings]} if settings else {})
    (folder / "additional_chat_templates").mkdir()
    for name in written:
        place = folder / (f"additional_chat_templates/{name}.jinja" if name else "chat_template.jinja")
        place.write_text(f"file {name}")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    files, vocabulary = files_in(folder), TokenizerFile.read(folder / "tokenizer.json")
    try:
        expected = theirs.get_chat_template()
    except ValueError:
        with pytest.raises(ValueError, match=r"^here has (no chat template|chat templates in)"):
            chat_template(files, vocabulary, "here")
    else:
        assert chat_template(files, vocabulary, "here").text == expected


def test_a_template_file_is_before_the_settings(folder):
    vocabulary = TokenizerFile.read(folder / "tokenizer.json")
    write(folder, "tokenizer_config.json", {"chat_template": "settings", "bos_token": {"content": "<s>"}})
    assert chat_template(files_in(folder), vocabulary, "here").text == "settings"
    (folder / "chat_template.jinja").write_text("file")
    found = chat_template(files_in(folder), vocabulary, "here")
    assert (found.text, found.special, found.what) == ("file", {"bos_token": "<s>"}, "the chat template of here")


USES = "{{bos_token}}|{{eos_token}}|{{unk_token}}|{{pad_token}}|{{image_token}}|{{messages[0].content}}"
END = "<|endoftext|>"
DECODER = {"0": {"content": END, "special": True}}
MAP = {"bos_token": "t", "eos_token": {"content": "t"}, "image_token": "<image>"}
SETTINGS = {
    "none": {},
    "all": {"bos_token": END, "eos_token": "t", "unk_token": "a", "pad_token": "e"},
    "no bos": {"bos_token": None},
    "an extra one": {"extra_special_tokens": {"image_token": "t", "word": "a"}},
    "another extra one": {"image_token": "t", "add_bos_token": False},
    "added tokens": {"bos_token": END, "added_tokens_decoder": DECODER},
}


@pytest.mark.parametrize("model", ["gpt_neox", "gpt2"])
@pytest.mark.parametrize("kind", ["GPTNeoXTokenizerFast", "GPT2Tokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("mapped", [False, True], ids=["", "with a map"])
@pytest.mark.parametrize("name", SETTINGS)
def test_special_tokens_and_prompts_are_those_of_transformers(folder, name, mapped, kind, model):
    transformers = pytest.importorskip("transformers")
    write(folder, "config.json", {"model_type": model})
    write(folder, "tokenizer_config.json", SETTINGS[name] | ({"tokenizer_class": kind} if kind else {}))
    if mapped:
        write(folder, "special_tokens_map.json", MAP)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    vocabulary, files = TokenizerFile.read(folder), files_in(folder)
    assert special_tokens_of(files) == theirs.special_tokens_map
    known = {"bos": theirs.bos_token_id, "eos": theirs.eos_token_id}
    assert special_ids(files, {"bos": None, "eos": None}, vocabulary, None, "here") == known
    messages = [{"role": "user", "content": "a"}]
    expected = theirs.apply_chat_template(messages, chat_template=USES, tokenize=False)
    (folder / "chat_template.jinja").write_text(USES)
    if kind == "GPTNeoXTokenizerFast" and model == "gpt_neox":  # the rest does not depend on them
        assert chat_template(files_in(folder), vocabulary, "here").render(messages) == expected
    text = f"{END} x y{END}"
    assert vocabulary.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
