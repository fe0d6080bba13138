"""What a row says, in every form; what contradicts itself is named."""

import pytest

from rlhf_core.data.dialogues import Chat, split_dialogues
from rlhf_core.data.examples import Example, example_of, held_out, need_of
from rlhf_core.data.records import RowError
from rlhf_core.data.tokenization import byte_pair_tokenizer, untrained_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


def said(content):
    return [{"role": "assistant", "content": content}]


@pytest.fixture(scope="module")
def chat():
    tokenizer = byte_pair_tokenizer(["hello"], 300)
    tokenizer.chat_template = TEMPLATE
    return Chat(tokenizer)


def of(row, chat=None):
    return example_of(row, chat or Chat(None))


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "p", "completion": "c", "id": 3}, Example("p", "c")),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, Example("p", "c", "r")),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}, Example("p", "c", "r", 2.0)),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "0.5", "tie": ""}, Example("p", "c", "r", 0.5)),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tie": True}, Example("p", "c", "r", 0.0, True)),
        ({"prompt": "p"}, Example("p")),
        ({"text": "t"}, Example("", "t")),
        ({"text": "t", "label": "0"}, Example("", "t", label=False)),
        ({"text": "t", "label": "Positive"}, Example("", "t", label=True)),
    ],
)
def test_texts(row, example):
    assert of(row) == example


def test_dialogues_share_what_stands_before_the_last_assistant_that_both_have():
    before = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: joke?\n\nAssistant:"
    row = {"chosen": before + " A joke.", "rejected": before + " A no.\n\nHuman: why\n\nAssistant: so"}
    assert of(row) == Example(before, " A joke.", " A no.\n\nHuman: why\n\nAssistant: so")
    # The marker counts only where it is whole in both.
    assert split_dialogues("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: a\n\nAssistant: y") == (
        "\n\nHuman: a\n\nAssistant:", " x", " y",
    )  # fmt: skip
    assert split_dialogues("\r\n\r\nHuman: a\r\n\r\nAssistant: x", "\r\n\r\nHuman: a\r\n\r\nAssistant: y") == (
        "\r\n\r\nHuman: a\r\n\r\nAssistant:", " x", " y",
    )  # fmt: skip


class TestMessages:
    def test_a_dialogue_of_messages_is_a_demonstration_when_the_assistant_speaks_last(self, chat):
        prompt = "<user>hello<eos>\n<assistant>"
        assert of({"messages": [*HELLO, *said("hi")]}, chat) == Example(prompt, "hi<eos>\n", rendered=True)
        assert of({"messages": HELLO}, chat) == Example(prompt, rendered=True)

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": HELLO, "chosen": said("a"), "rejected": said("b")},
            {"prompt": "hello", "chosen": said("a"), "rejected": said("b")},
            {"prompt": "hello", "chosen": [*HELLO, *said("a")], "rejected": [*HELLO, *said("b")]},
            {"prompt": HELLO, "chosen": "a", "rejected": "b"},
            {"chosen": [*HELLO, *said("a")], "rejected": [*HELLO, *said("b")]},
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
                "chosen": said("a"),
                "rejected": said("b"),
            },
        ],
    )
    def test_preferences_of_messages_are_one_whatever_their_form(self, chat, row):
        prompt = "<user>hello<eos>\n<assistant>"
        assert of(row, chat) == Example(prompt, "a<eos>\n", "b<eos>\n", rendered=True)

    def test_a_prompt_beside_whole_dialogues_is_found_behind_their_system_message(self, chat):
        system = [{"role": "system", "content": "be kind"}]
        row = {"prompt": "hello", "chosen": [*system, *HELLO, *said("a")], "rejected": [*system, *HELLO, *said("b")]}
        prompt = "<system>be kind<eos>\n<user>hello<eos>\n<assistant>"
        expected = Example(prompt, "a<eos>\n", "b<eos>\n", rendered=True)
        assert of(row, chat) == of(row | {"prompt": [*system, *HELLO]}, chat) == expected

    def test_an_answer_that_begins_with_somebody_elses_message_is_refused(self, chat):
        other = [{"role": "user", "content": "something else"}, *said("a")]
        for row in (
            {"prompt": "hello", "chosen": other, "rejected": [*HELLO, *said("b")]},
            {"prompt": "hello", "completion": other},
        ):
            with pytest.raises(RowError, match="goes on after the prompt with a message of user; give the answer") as e:
                of(row, chat)
            assert e.value.reason == "contradiction"

    def test_a_tokenizer_that_is_trained_here_writes_dialogues_as_hh_rlhf_does(self):
        row = {"messages": [{"role": "system", "content": "be kind"}, *HELLO, *said("hi"), *HELLO, *said("so")]}
        before = "\n\nSystem: be kind\n\nHuman: hello\n\nAssistant: hi<eos>\n\nHuman: hello\n\nAssistant:"
        assert of(row, Chat(untrained_tokenizer())) == Example(before, " so<eos>", rendered=True)

    def test_demonstrations_and_prompts_of_messages(self, chat):
        prompt = "<user>hello<eos>\n<assistant>"
        assert of({"prompt": HELLO, "completion": said("hi")}, chat) == Example(prompt, "hi<eos>\n", rendered=True)
        assert of({"prompt": HELLO}, chat) == Example(prompt, rendered=True)

    def test_without_a_template_it_is_refused_as_a_whole_and_not_row_by_row(self):
        with pytest.raises(
            ValueError, match=r"has no chat template; take a --model\.path whose tokenizer has one"
        ) as e:
            of({"messages": [*HELLO, *said("hi")]})
        assert not isinstance(e.value, RowError)

    def test_what_the_template_refuses_is_a_bad_row(self, chat):
        tokenizer = byte_pair_tokenizer(["hello"], 300)
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(RowError, match="refused by the chat template: roles must alternate"):
            of({"messages": HELLO}, Chat(tokenizer))
        tokenizer.chat_template = "{{ messages | length }}"
        with pytest.raises(RowError, match="does not begin with its own prompt"):
            of({"messages": [*HELLO, *said("hi")]}, Chat(tokenizer))


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({}, "missing keys", "the row has no key; it needs prompt"),
        ({"question": "q"}, "missing keys", "the row has question; it needs"),
        ({"chosen": "a"}, "missing keys", "there is no rejected beside chosen"),
        ({"completion": "a"}, "missing keys", "there is no prompt beside completion"),
        ({"prompt": 3}, "wrong type", r"prompt is 3 \(int\); it must be a string"),
        ({"prompt": None, "completion": "c"}, "wrong type", "prompt is None"),
        ({"prompt": float("nan")}, "NaN or infinity", "prompt is NaN"),
        ({"prompt": " \n"}, "empty prompt", ""),
        ({"prompt": "p", "completion": ""}, "empty completion", ""),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "empty chosen", ""),
        ({"prompt": "a\ud800"}, "not UTF-8", "prompt has a byte or a lone surrogate at place 2"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "chosen equals rejected", "mark a tie of two texts"),
        ({"chosen": "no dialogue", "rejected": "none"}, "no common prompt", "give a key prompt"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "x"}, "wrong type", "margin is 'x'"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": True}, "wrong type", "margin is True"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": float("inf")}, "NaN or infinity", "margin is inf"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": -1}, "contradiction", "cannot be worse"),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1, "tie": 1},
            "contradiction",
            "a tie has no margin",
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tie": "perhaps"}, "wrong type", "tie is 'perhaps'"),
        ({"text": "t", "label": 7}, "wrong type", "label is 7"),
        ({"messages": []}, "wrong type", r"messages is \[\]"),
        ({"messages": "hello"}, "wrong type", "it must be a list of messages"),
        ({"messages": [{"role": "user"}]}, "wrong type", r"messages\[0\] is .* must have role and content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role", "robot"),
        ({"messages": [{"role": "user", "content": ""}]}, "empty messages", "content of messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "empty prompt", ""),
        ({"chosen": [*HELLO, *said("a")], "rejected": [*HELLO, *said("a")]}, "chosen equals rejected", ""),
        ({"chosen": said("a"), "rejected": said("b")}, "no common prompt", ""),
        ({"chosen": HELLO, "rejected": [*HELLO, *said("a")]}, "empty completion", ""),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, reason, detail, chat):
    with pytest.raises(RowError, match=detail or reason) as error:
        of(row, chat)
    assert error.value.reason == reason


def test_a_row_that_does_not_serve_is_refused():
    with pytest.raises(RowError, match="no preference"):
        need_of(Example("p", "c"), "pair")
    with pytest.raises(RowError, match="no completion"):
        need_of(Example("p"), "demonstration")
    assert need_of(Example("p", "c", "r"), "demonstration").completion == "c"


def test_the_split_is_a_function_of_the_content_with_the_share_that_was_asked_for():
    # `printf %s TEXT | sha256sum`: "good" begins with 770e6076 (0.465 of 2**32), "superb" with 0178fa91 (0.0057).
    assert [held_out("superb", share) for share in (0.005, 0.006)] == [False, True]
    assert [held_out("good", share) for share in (0.46, 0.47)] == [False, True]
    share = sum(held_out(str(number), 0.1) for number in range(10_000)) / 10_000
    assert abs(share - 0.1) < 5 * (0.1 * 0.9 / 10_000) ** 0.5


def test_different_contents_have_different_digests():
    rows = [Example("p", "c", "r"), Example("p", "c"), Example("pc", ""), Example("p", "c", "r", 1.0), Example("p")]
    assert len({row.digest() for row in rows}) == len(rows)
