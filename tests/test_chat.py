"""The chat: what a model is asked, what it remembers, and what a terminal is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from align_ti.cli import app
from align_ti.config import Evaluation
from align_ti.data.conversation import Conversation, Turn
from align_ti.errors import DataError, ModelError
from align_ti.evaluation import chat as chat_module
from align_ti.evaluation.chat import Chat, visible
from align_ti.evaluation.runner import answer
from align_ti.evaluation.tasks import Question
from align_ti.models.loading import load_model, load_processor
from align_ti.pipeline import measuring
from tests import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    small.write_pair(path)
    small.write_records(path)
    # A random model may end its answer at once; this one never does.
    model, processor = load_model(str(path / "student")), load_processor(str(path / "student"))
    model.generation_config.suppress_tokens = processor.tokenizer.all_special_ids
    for part in (model, processor):
        part.save_pretrained(path / "talkative")
    return path


def run(folder: Path, *arguments: str, typed: str | None = None):
    images = ["--image", str(folder / "train-0.png")]
    return CliRunner().invoke(
        app, ["chat", str(folder / "talkative"), *images, "--max-new-tokens", "6", *arguments], input=typed
    )


def test_a_question_is_answered_as_in_an_evaluation(folder):
    model, processor = load_model(str(folder / "talkative")), load_processor(str(folder / "talkative"))
    images = (folder / "train-0.png", folder / "train-1.png")
    one = Chat(model, processor, images, max_new_tokens=6)
    text, cut = one.ask("Which digits?")
    record = Conversation((Turn("user", "<image><image>Which digits?"),), images)
    settings = Evaluation(max_new_tokens=6)
    assert [(text, cut)] == answer(model, processor, [Question(record, "", "", "")], settings)
    assert one.turns == (record.turns[0], Turn("assistant", text))
    second, _ = one.ask("And now?")
    assert one.turns[2:] == (Turn("user", "And now?"), Turn("assistant", second))
    whole = Conversation(one.turns[:3], images)
    assert answer(model, processor, [Question(whole, "", "", "")], settings)[0][0] == second


def test_an_empty_answer_is_forgotten_with_its_question(folder, monkeypatch):
    asked = []

    def say(model, processor, questions, settings):
        asked.append(questions[0].conversation)
        return [("" if len(asked) == 1 else "yes", False)]

    monkeypatch.setattr(chat_module, "answer", say)
    model, processor = load_model(str(folder / "student")), load_processor(str(folder / "student"))
    one = Chat(model, processor, (folder / "train-0.png",))
    assert one.ask("First?") == ("", False) and one.turns == ()
    assert one.ask("Second?") == ("yes", False)
    assert asked[1].turns == (Turn("user", "<image>Second?"),)


def test_student_and_teacher_answer_under_their_names(folder):
    result = run(folder, "--teacher", str(folder / "teacher"), "--question", "Read [bold]every[/bold] digit.")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.partition(":")[0] for line in lines if ":" in line[:9]][:2] == ["student", "teacher"]


def test_the_conversation_goes_on_until_ctrl_d_and_survives_a_bad_question(folder, monkeypatch):
    kept = []

    def open_chats(*arguments):
        kept.extend(real(*arguments))
        return kept

    real = measuring.open_chats
    monkeypatch.setattr(measuring, "open_chats", open_chats)
    result = run(folder, typed="What?\n\nAn <image> tag\nAnd then?\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("student: ") == 2
    assert "2 <image> tag(s)" in result.output or "tag(s) in the text" in result.output
    assert [turn.speaker for turn in kept[0].turns] == ["user", "assistant"] * 2
    assert kept[0].turns[2].text == "And then?"


def test_markup_and_control_characters_of_a_model_stay_text(folder, monkeypatch):
    # An answer could clear the screen, retitle the window, or be read as rich markup.
    monkeypatch.setattr(Chat, "ask", lambda self, question: ("[red]a[/red] \x1b[2J\x9b1m[/nope]\nb\tc", True))
    result = run(folder, "--question", "What?")
    assert result.exit_code == 0, result.output
    assert "[red]a[/red]" in result.output and "[/nope]" in result.output
    assert "\x1b" not in result.output and "\x9b" not in result.output
    assert "truncated at 6 tokens" in result.output
    assert visible("a\x1bb\x00\n\tü\u200d\ud800") == "a�b�\n\tü\u200d�"


def test_what_cannot_be_talked_about_is_refused(folder, tmp_path):
    (tmp_path / "no.png").write_text("no image")
    for picture in ("no.png", "gone.png"):
        with pytest.raises(DataError, match=picture):
            measuring.open_chats([str(folder / "student")], [tmp_path / picture], 4)
    result = CliRunner().invoke(app, ["chat", str(tmp_path / "nowhere")])
    assert isinstance(result.exception, ModelError)
