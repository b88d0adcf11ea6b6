import copy
import json
import subprocess
import sys

import pytest

from jaxrlhf.data import tokenizer as tk

from .conftest import TEXTS


@pytest.mark.parametrize(
    "text", ["", " ", "a b", " a  b\n\tc ", "don't .", "caf\u00e9 \U0001f642 \u4e2d", "x <eos> y", "\x00\r\n"]
)
def test_trained_bpe_round_trips(trained, text):
    ids = tk.encode_text(trained, text).ids
    assert trained.decode(ids) == text
    assert trained(text, add_special_tokens=False)["input_ids"] == ids


def test_trained_bpe(trained):
    assert (trained.pad_token_id, trained.eos_token_id, trained.bos_token_id, len(trained)) == (0, 1, 2, 300)
    assert trained("a")["input_ids"][0] == 2 and tk.leading_ids(trained) == [2]  # a text starts with BOS
    assert len(tk.encode_text(trained, "the film is good").ids) < 10  # it has merged
    assert tk.fingerprint(tk.train_bpe(TEXTS * 3, 300)) == tk.fingerprint(trained)
    assert len(tk.train_bpe(["ab"], 1000)) < 300  # no more pairs than there are
    with pytest.raises(ValueError, match=r"tokenizer\.train_vocab_size: 258, expected at least 259"):
        tk.train_bpe(["a"], 258)


def test_save_and_load(trained, tmp_path):
    tokenizer = copy.deepcopy(trained)
    tokenizer.chat_template = "{{ messages }}"
    tk.save_tokenizer(tokenizer, str(tmp_path / "new" / "tok"))
    loaded = tk.load_tokenizer(str(tmp_path / "new" / "tok"))
    assert tk.fingerprint(loaded) == tk.fingerprint(tokenizer)
    assert loaded.chat_template == tokenizer.chat_template
    assert tk.leading_ids(loaded) == [2]
    assert loaded.decode(loaded(" a ,b")["input_ids"]) == "<bos> a ,b"
    tk.save_tokenizer(loaded, str(tmp_path / "new" / "tok"))  # over the one saved before


def test_fingerprint(tokenizer):
    before = tk.fingerprint(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "x"
    other(["a b c", "d"], padding=True, truncation=True, max_length=2)
    assert tk.fingerprint(other) == before
    other.add_tokens(["film"])
    assert tk.fingerprint(other) != before
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    assert tk.fingerprint(other) != before
    assert tk.fingerprint(tk.train_bpe(TEXTS, 290)) != before


def test_ids_that_end_and_fill(tokenizer):
    assert tk.eos_ids(tokenizer) == tk.eos_ids(tokenizer, {}) == (1,)
    assert tk.eos_ids(tokenizer, {"eos_token_id": 7}) == (1, 7)
    assert tk.eos_ids(tokenizer, {"eos_token_id": [7, 1, 9]}) == (1, 7, 9)
    assert tk.eos_ids(tokenizer, {"eos_token_id": None}) == (1,)
    assert tk.pad_id(tokenizer) == 0 and tk.start_id(tokenizer) == 1
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert tk.pad_id(bare) == 1
    bare.eos_token = None
    assert tk.eos_ids(bare, {"eos_token_id": 3}) == (3,)
    with pytest.raises(ValueError, match="has no EOS token"):
        tk.eos_ids(bare)


def test_leading_ids(tokenizer, add_bos):
    assert tk.leading_ids(tokenizer) == []
    assert tk.leading_ids(add_bos) == [add_bos.bos_token_id] == [tk.start_id(add_bos)]


def test_truncation_left_on_by_a_call_does_not_cut(tokenizer):
    other = copy.deepcopy(tokenizer)
    other("a b c d e", truncation=True, max_length=2, padding="max_length")
    assert other.decode(tk.encode_text(other, "a b c d e").ids) == "a b c d e"
    assert len(tk.encode_text(other, "").ids) == 0


LOADED = """
import sys
from jaxrlhf.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
print([name for name in ("transformers.models.auto.tokenization_auto", "torch") if name in sys.modules])
"""


def test_a_tokenizer_trained_here_is_loaded_quietly_and_without_all_models(tmp_path):
    """As AutoTokenizer loads it, whose import takes 0.6 s."""
    from transformers import AutoTokenizer

    folder = str(tmp_path / "tok")
    tk.save_tokenizer(tk.train_bpe(["the film is warm", "über"], 300), folder)
    done = subprocess.run([sys.executable, "-c", LOADED, folder], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    ours, theirs = tk.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs) and ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.init_kwargs == {**theirs.init_kwargs, "name_or_path": folder}
    (tmp_path / "tok" / "config.json").write_text('{"model_type": "llama"}')
    assert not tk.is_generic(folder)  # AutoTokenizer knows what a llama needs


def test_what_is_no_tokenizer(tmp_path):
    for path, message in ((str(tmp_path / "none"), "is not a folder"), (str(tmp_path), "can't be loaded: ")):
        with pytest.raises(ValueError, match=message) as error:
            tk.load_tokenizer(path)
        assert "\n" not in str(error.value)


def test_code_of_a_tokenizer_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(ValueError, match="can't be loaded"):
        tk.load_tokenizer(str(tmp_path))
    assert not marker.exists()


def stopped(tokenizer, stop: str, *parts) -> bool:
    """Whether a policy that writes ``parts`` (text, or a token's id) one after the other is stopped by ``stop``."""
    from jaxrlhf.generate.stop_texts import stop_automaton

    pieces, vocab = tk.token_bytes(tokenizer), len(tokenizer)
    tables = [stop_automaton(form, pieces, vocab).table for form in tk.stop_forms(tokenizer, stop)]
    ids = [id for part in parts for id in ([part] if isinstance(part, int) else tk.encode_text(tokenizer, part).ids)]
    states = [0] * len(tables)
    for id in ids:
        states = [table[state, id] for table, state in zip(tables, states)]
    return any(state == len(table) - 1 for table, state in zip(tables, states))


@pytest.mark.parametrize(
    "stop, written, found",
    [
        ("<|im_end|>", ["good", "<|im_end|>"], True),
        ("<|im_end|>", ["good", "<|im_", "end|>"], True),  # in letters
        ("<|im_end|>", ["good", "<|im_start|>"], False),
        ("film<|im_end|>", ["the film", "<|im_end|>"], True),
        ("film<|im_end|>", ["the plot", "<|im_end|>"], False),
        ("film<|im_end|>", ["the film", "<|im_start|>", "<|im_end|>"], False),
        ("<|im_end|>\n", ["film", "<|im_end|>", "\n"], True),
        ("<|im_end|><|im_start|>", ["film", "<|im_end|>", "<|im_start|>"], True),
        ("<|im_end|>", ["<|im_end|"], False),
        ("<eos>", ["film", "<eos>"], True),
        ("\u00e9nd", ["film", "\u00e9nd"], True),  # a word that was added, not special
        ("the \u00e9nd", ["film is the ", "\u00e9nd"], True),
        ("\uff5cend\u2581of\uff5c", ["film", "\uff5cend\u2581of\uff5c"], True),  # as DeepSeek's
        ("caf\u00e9", ["the caf", "\u00e9"], True),
        ("film", ["the fi", "lm"], True),
        (">", ["film", "<|im_end|>"], False),  # what special tokens are called is no text
    ],
)
def test_stop_texts_that_hold_added_tokens(tokenizer, stop, written, found):
    """The tokenizer's own cut of the text and ids of special tokens, as a policy samples them."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "\uff5cend\u2581of\uff5c"]})
    other.add_tokens(["\u00e9nd"])
    assert stopped(other, stop, *written) is found


def test_what_added_words_write_in_a_byte_level_vocabulary(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["\u00e9nd", "a b"])
    pieces = tk.token_bytes(other)
    assert [pieces[other.convert_tokens_to_ids(word)] for word in ("\u00e9nd", "a b")] == ["\u00e9nd".encode(), b"a b"]


@pytest.mark.parametrize("eos", ['"x"', "[1, null]", "true", "-1", "1.5", "[[1]]"])
def test_an_eos_that_is_no_id_is_one_line(tmp_path, eos):
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id: .*; expected the id of a token$"):
        tk.folder_eos(str(tmp_path))
