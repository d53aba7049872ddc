"""Conversations: what the template writes, and on which of its tokens the loss is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_runs import tokenizer_folder

from memplan.errors import DataError
from memplan.job.spec import Data
from memplan.train.documents import Reader
from memplan.train.samples import ID_BITS, MASKED, build_samples
from memplan.train.sources import read_source
from memplan.train.tokens import Tokenizer, load_tokenizer

pytestmark = pytest.mark.torch

PLAIN = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}<eos>{% endgeneration %}{% else %}{{ message.content }}<eos>{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for message in messages %}<{{ message.role }}>{% if loop.last %}(thinks){% endif %}{{ message.content }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def _tokenizer(root: Path, template: str | None) -> Tokenizer:
    folder = tokenizer_folder(root, template)
    return load_tokenizer("here", folder, weights="random", vocab_size=260)


def _learnt(root: Path, template: str | None, row: dict[str, Any], **data: Any) -> tuple[str, str]:
    """The whole sample, and what of it is learnt."""
    path = root / "train.jsonl"
    path.write_text(json.dumps(row))
    tokenizer = _tokenizer(root, template)
    rows = read_source(str(path), resolve=Path, split="train")
    documents = Reader(Data(**data), tokenizer.render).documents(rows)
    samples = build_samples(documents, tokenizer.tokenize, max_seq_len=500, packing=False)
    tokens = list(samples[0])
    whole = tokenizer.decode([token & ID_BITS for token in tokens])
    return whole, tokenizer.decode([token & ID_BITS for token in tokens[1:] if token < MASKED])


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_assistants_turns_are_learnt(tmp_path: Path, template: str) -> None:
    """Its words and what ends its turns; everything with `none`, the last turn alone with `history`."""
    text = "<user>one<eos><assistant>two<eos><user>three<eos><assistant>four<eos>"

    assert (text, "two<eos>four<eos>") == _learnt(tmp_path, template, {"messages": MESSAGES})
    assert (text, "four<eos>") == _learnt(tmp_path, template, {"messages": MESSAGES}, mask="history")
    assert (text, text[1:]) == _learnt(tmp_path, template, {"messages": MESSAGES}, mask="none")


def test_other_shapes_of_conversations(tmp_path: Path) -> None:
    """ShareGPT's names, another column, and a prompt and completion that are messages."""
    turns = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
    expected = ("<user>one<eos><assistant>two<eos>", "two<eos>")

    assert expected == _learnt(tmp_path, PLAIN, {"conversations": turns})
    assert expected == _learnt(tmp_path, PLAIN, {"talk": MESSAGES[:2]}, messages="talk", format="chat")
    assert expected == _learnt(tmp_path, PLAIN, {"prompt": MESSAGES[:1], "completion": MESSAGES[1:2]})
    with pytest.raises(DataError, match="line 1: a message has `who`, not `role` and `content`"):
        _learnt(tmp_path, PLAIN, {"messages": [{"who": "me"}]})


def test_a_template_that_forgets_is_refused(tmp_path: Path) -> None:
    """Earlier turns that are written differently later cannot be found again; the last one can."""
    with pytest.raises(DataError, match="line 1: the chat template writes turn 2 differently") as caught:
        _learnt(tmp_path, FORGETFUL, {"messages": MESSAGES})
    assert "data.mask=history" in (caught.value.hint or "")
    with pytest.raises(DataError, match="the chat template refuses the conversation: no such role"):
        _learnt(tmp_path, "{{ raise_exception('no such role') }}", {"messages": MESSAGES})


def test_a_template_file_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    """`data.chat_template` is used, and goes into the final folder with the tokenizer."""
    template = tmp_path / "template.jinja"
    template.write_text(PLAIN)
    folder = tokenizer_folder(tmp_path, None)
    assert load_tokenizer("here", folder, weights="random", vocab_size=260).render is None

    tokenizer = load_tokenizer("here", folder, weights="random", vocab_size=260, chat_template=str(template))

    assert tokenizer.render is not None
    assert tokenizer.render(MESSAGES[:2], None, "none")[0] == "<user>one<eos><assistant>two<eos>"
    assert tokenizer.save is not None
    tokenizer.save(tmp_path / "saved")
    saved = load_tokenizer("here", tmp_path / "saved", weights="random", vocab_size=260)
    assert saved.render is not None
    with pytest.raises(DataError, match=r"chat template `nowhere\.jinja` cannot be read"):
        load_tokenizer("here", folder, weights="random", vocab_size=260, chat_template="nowhere.jinja")


def test_a_prompt_that_ends_inside_a_token(tmp_path: Path) -> None:
    """A completion's end of text is learnt, its prompt is not."""
    row = {"prompt": "2+2=", "completion": "4"}

    assert ("2+2=4<eos>", "4<eos>") == _learnt(tmp_path, None, row)
    assert ("2+2=4<eos>", "+2=4<eos>") == _learnt(tmp_path, None, row, mask="none")
