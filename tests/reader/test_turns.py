"""What the template wrote is told from what others wrote, by ids alone, and places index the text."""

import shutil

import pytest

from guard.reader.sequence import TokenSequence
from guard.reader.tokens import TextTokenizer
from guard.reader.turns import Template, Turns
from guard.records import Message, Phase, Role

TEXTS = ["plain words", "你好 🙂👩‍👩‍👧 n\u0303o\n\nend ", "\n\nbegins with lines", " assistant\n", "user", "é"]
TEMPLATES = {
    "own": None,
    "headers": "{% for m in messages %}<repo_name>{{ m.role }}<file_sep>\n\n{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<repo_name>assistant<file_sep>\n\n{% endif %}",
    "bare": "{% for m in messages %}{% if m.role == 'assistant' %}<filename>{{ m.content }}<|im_end|>{% else %}<repo_name>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<filename>{% endif %}",
}


@pytest.fixture(params=TEMPLATES)
def tokenizer(request, model_folder, tmp_path):
    if TEMPLATES[request.param] is None:
        return TextTokenizer(model_folder)
    shutil.copy(model_folder / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[request.param], encoding="utf-8")
    return TextTokenizer(tmp_path)


def read(tokenizer, ids, prompt_tokens, size):
    turns, tokens = Turns(Template(tokenizer)), TokenSequence()
    for phase, part in ((Phase.PROMPT, ids[:prompt_tokens]), (Phase.COMPLETION, ids[prompt_tokens:])):
        for begin in range(0, len(part), size):
            turns.append(part[begin : begin + size], phase, tokens)
    turns.flush(tokens)
    return tokens


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("system", [True, False])
def test_scaffold_and_places_are_those_of_the_chat(tokenizer, system, size):
    roles = [Role.SYSTEM] * system + [Role.USER, Role.ASSISTANT, Role.USER]
    for number in range(len(TEXTS)):
        chat = [Message(role, TEXTS[(number + i) % len(TEXTS)]) for i, role in enumerate(roles)]
        wanted = TokenSequence()
        for piece in tokenizer.chat(chat, open_reply=True):
            wanted.append(piece, Phase.PROMPT)
        prompt_tokens = len(wanted)
        wanted.append(tokenizer.text(TEXTS[number]), Phase.COMPLETION)
        found = read(tokenizer, wanted.ids, prompt_tokens, size)
        assert found.ids == wanted.ids
        assert found.phase == wanted.phase
        for where, expected, phase in zip(found.places().tolist(), wanted.places().tolist(), found.phase, strict=True):
            assert phase is None or where == expected


def test_a_system_message_that_begins_like_the_default_one_is_read(model_folder):
    tokenizer = TextTokenizer(model_folder)
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for said in ("You are a helpful AI assistant named Tom", f"{default}. Answer in French.", f"{default}book"):
        wanted = TokenSequence()
        for piece in tokenizer.chat([Message(Role.SYSTEM, said), Message(Role.USER, "hi")], open_reply=True):
            wanted.append(piece, Phase.PROMPT)
        found = read(tokenizer, wanted.ids, len(wanted), 1)
        assert found.phase == wanted.phase
        told = [p is not None for p in wanted.phase]
        assert (found.places()[told] == wanted.places()[told]).all()


def test_a_text_without_a_template_counts_from_its_first_token_which_is_not_scored(model_folder):
    tokenizer = TextTokenizer(model_folder)
    piece = tokenizer.text("Once upon a 🙂 time")
    found = read(tokenizer, piece.ids, len(piece.ids), 2)
    assert found.phase == [None] + [Phase.PROMPT] * (len(piece.ids) - 1)
    assert [(start, end) for start, end, _ in found.places().tolist()] == piece.spans


def test_the_bytes_of_all_tokens_make_the_text(model_folder):
    tokenizer = TextTokenizer(model_folder)
    for text in TEXTS:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.text(text).ids)) == text.encode()
