"""The pure scorers: every rule and edge case of the originals, and properties."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_ti.errors import DataError
from align_ti.evaluation.scoring import (
    SCORERS,
    anls,
    choice_letter,
    contains,
    exact_match,
    gqa_normalize,
    mmbench_choice,
    mme_answer,
    numeric,
    pope_answer,
    scienceqa_choice,
    vqa_accuracy,
    vqa_consensus,
    vqa_normalize,
    word_f1,
    yes_no,
)
from align_ti.evaluation.scoring.own import edits
from align_ti.evaluation.scoring.vqa import CONTRACTIONS

ANYTHING = st.text(max_size=30)
WORDS = st.lists(
    st.sampled_from(
        [
            "a",
            "the",
            "one",
            "ten",
            "dont",
            "cat",
            "3.14",
            "p.m.",
            "it's",
            "-",
            "x-y",
            ";",
            "\u2019",
            "\n",
            "A",
            "B",
            "yes",
            "No",
        ]
    ),
    max_size=8,
).map(" ".join)


# --- GQA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cat.", "cat"),
        ("cat...", "cat"),
        ("cat. ", "cat. "),
        (" cat", " cat"),
        ("the cat", "the cat"),
        ("Two", "two"),
        ("cat!", "cat!"),
        ("a.b.", "a.b"),
        ("...", ""),
        ("", ""),
        ("ÉTÉ.", "été"),
    ],
)
def test_gqa_strips_closing_full_stops_and_nothing_else(text, expected):
    assert gqa_normalize(text) == expected


@given(ANYTHING)
def test_gqa_normalised_text_stays_as_it_is(text):
    once = gqa_normalize(text)
    assert not once.endswith(".")
    assert gqa_normalize(once) == once


# --- POPE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "NO",
        "Not",
        "no!",
        "none",
        "Nope",
        "cannot",
        "isn't",
        "no\n",
        "maybe",
        "Yes. No.",
        "e.g. no dog",
        "Yes,no",
        "\tno",
        "N o",
    ],
)
def test_pope_takes_everything_else_for_a_yes(text):
    assert pope_answer(text) == "yes"


@pytest.mark.parametrize(
    "text", ["No", "no", "not", "Yes, not", "not sure", "No. Yes.", "no,", "n,o", " no ", "There is no dog"]
)
def test_pope_knows_three_words_of_no(text):
    assert pope_answer(text) == "no"


@given(ANYTHING, ANYTHING)
def test_pope_reads_up_to_the_first_full_stop(before, behind):
    assert pope_answer(f"{before}.{behind}") == pope_answer(before)


# --- MME --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("Yes.", "yes"),
        ("YES", "yes"),
        ("no", "no"),
        ("know", "no"),
        ("Not", "no"),
        ("Nope", "no"),
        ("None", "no"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("**Yes**", "other"),
        ("y", "other"),
        ("", "other"),
        ("The answer is yes", "other"),
        ("yesno", "yes"),
        ("Uno", "no"),
    ],
)
def test_mme_reads_four_characters(text, expected):
    assert mme_answer(text) == expected


@given(ANYTHING, ANYTHING)
def test_mme_never_looks_behind_the_fourth_character(text, behind):
    start = text[:4].ljust(4, "x")
    assert mme_answer(start + behind) == mme_answer(start)


# --- ScienceQA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("A", 2, 0),
        ("E", 5, 4),
        ("E", 4, None),
        ("C", 2, None),
        ("F", 6, None),
        ("B. because", 3, 1),
        ("B. ", 3, 1),
        ("B.", 3, None),
        ("A.", 3, None),
        ("(A)", 3, None),
        ("A\n", 3, None),
        (" A", 3, None),
        ("a", 3, None),
        ("", 3, None),
        ("The answer is B.", 3, 1),
        ("So. The answer is B!", 3, 1),
        ("The answer is B", 3, None),
        ("The answer is B\n", 3, None),
        ("The answer is AB", 3, 0),
        ("the answer is B.", 3, None),
        ("The answer is A. The answer is A.", 3, None),
        ("B. The answer is A.", 3, 1),
        ("The answer is D.", 3, None),
        ("The answer is Z.", 5, None),
        ("AB", 3, None),
        ("A B", 3, None),
    ],
)
def test_scienceqa_letters(text, choices, expected):
    assert scienceqa_choice(text, choices) == expected


@given(WORDS, st.integers(0, 7))
def test_scienceqa_chooses_what_is_offered_or_nothing(text, choices):
    found = scienceqa_choice(text, choices)
    assert found is None or 0 <= found < min(choices, 5)
    assert found is None or scienceqa_choice(text, choices + 1) == found


# --- MMBench ----------------------------------------------------------------------------------------------------------

OPTIONS = {"A": "a red car", "B": "a dog", "C": "the sea", "D": "nothing"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("[B]", "B"),
        ("**B**", "B"),
        ("#B:", "B"),
        ("B. a dog", "B"),
        ("b", None),
        ("It must be B", "B"),
        ("A and B", None),
        ("A, A", "A"),
        # Only the first place counts, which has to be among the last four words.
        ("B it is for sure", None),
        ("B it is sure", "B"),
        ("One two three B four five six seven", None),
        # Stated, in either case, whatever follows.
        ("The correct answer is B as everyone can see there", "B"),
        ("I think the answer is **c** and that is all I know", "C"),
        ("Between A and B the answer is B", "B"),
        ("the answer is Bob, I say", "B"),
        ("the answer is E", None),
        # By text.
        ("a dog", "B"),
        ("It is THE SEA", "C"),
        ("It is A DOG", "A"),
        ("a dog by the sea", None),
        ("dog", None),
        ("a dog " + "x" * 60, None),
        ("a dog " + "x" * 46, "B"),
        ("", None),
        # Refusals.
        ("Z", None),
        ("Cannot determine the answer", None),
        ("Cannot determine the answer, perhaps a dog", None),
        ("I can't process this file. B", None),
        ("Sorry, I can't help with images of people yet. The answer is B", None),
        ("I'm sorry, but without the image provided B", None),
        # A failed call gives no letter, but its text is looked at.
        ("Failed to obtain answer via API B", None),
        ("Failed to obtain answer via API. a dog", "B"),
        # Z beside a letter is a word.
        ("Z B", "B"),
    ],
)
def test_mmbench_letters(text, expected):
    assert mmbench_choice(text, OPTIONS) == expected


def test_mmbench_follows_the_options_that_there_are():
    assert mmbench_choice("C", {"A": "x", "B": "y"}) is None
    assert mmbench_choice("the answer is C", {"A": "long text", "B": "another one"}) is None
    assert mmbench_choice("E", {"A": "x", "E": "y"}) == "E"
    # An empty text is part of every answer.
    assert mmbench_choice("what", {"A": "", "B": "more text"}) == "A"


@given(WORDS)
def test_mmbench_chooses_an_option_or_none_and_leaves_them_as_they_are(text):
    options = dict(OPTIONS)
    assert mmbench_choice(text, options) in {*OPTIONS, None}
    assert options == OPTIONS


# --- VQA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("bob's", "bob 's"),
        ("it's", "it 's"),
        ("Let's", "let 's"),
        ("ow's'at", "ow 's'at"),
        ("1,000", "1000"),
        ("what?", "what"),
        ("a\nb\tc", "b c"),
        ("  x  ", "x"),
        # A mark is replaced by a space, or deleted everywhere if a space stands beside it somewhere.
        ("a-b", "b"),
        ("x-y", "x y"),
        ("x- y", "x y"),
        ("x-y z- w", "xy z w"),
        ("x -y-z", "x yz"),
        ("(x)", "x"),
        ("x;y/z", "x y z"),
        ('"x" y', "x y"),
        ("no!", "no"),
        ("a@b.com", "bcom"),
        ("x\\y", "x y"),
        # Full stops.
        ("3.", "3"),
        ("3.14", "3.14"),
        (".5", ".5"),
        ("p.m.", "pm"),
        ("a.b", "ab"),
        ("x.5", "x.5"),
        ("...", ""),
        # Untouched.
        ("10:30", "10:30"),
        ("a&b*c$d%e#f~g^h|i'j", "a&b*c$d%e#f~g^h|i'j"),
        ("don\u2019t", "don\u2019t"),
        ("x\u3001y\uff0cz\u2026", "x\u3001y\uff0cz\u2026"),
        ("“x”", "“x”"),
        # Numbers, articles, contractions: whole words.
        ("zero one two three four five six seven eight nine ten", "0 1 2 3 4 5 6 7 8 9 10"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("someone", "someone"),
        ("the cat and an owl", "cat and owl"),
        ("The", ""),
        ("theatre", "theatre"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd"),
        ("twas", "'twas"),
        ("'ows'at", "'ow's'at"),
        ("'ow'sat", "'ow 'sat"),
        ("oclock", "o'clock"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        # Keys with a capital in the original's table never match.
        ("Im", "im"),
        ("Ive", "ive"),
        ("Id've", "id've"),
        ("its", "its"),
        ("?", ""),
        ("", ""),
        ("x\u00a0y", "x y"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert vqa_normalize(text) == expected


@pytest.mark.parametrize(("stops", "left"), [(31, 0), (32, 0), (33, 1), (70, 38)])
def test_vqa_deletes_thirty_two_full_stops(stops, left):
    assert vqa_normalize("x" + "." * stops).count(".") == left


def test_vqa_contractions_have_one_apostrophe_less():
    assert len(CONTRACTIONS) == 114
    for short, whole in CONTRACTIONS.items():
        if short != "somebody'd":
            assert short.count("'") == whole.count("'") - 1
            assert short.replace("'", "") == whole.replace("'", "")
    # Words of their own stay words.
    assert not CONTRACTIONS.keys() & {"im", "its", "id", "shes", "wed", "well", "were", "hell", "ill", "shell"}


@given(ANYTHING, st.sampled_from(["\n", "\t", " "]))
def test_vqa_white_space_around_does_not_matter(text, space):
    assert vqa_normalize(space + text + space) == vqa_normalize(text)


@given(ANYTHING | WORDS)
def test_vqa_normalised_text_has_single_spaces_and_no_articles(text):
    words = vqa_normalize(text).split(" ")
    assert not {"a", "an", "the", "one", "none"} & set(words)
    assert vqa_normalize(text) == " ".join(vqa_normalize(text).split())


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)])
def test_vqa_accuracy_by_how_many_agree(same, expected):
    answers = ["Cat."] * same + [f"other {index}" for index in range(10 - same)]
    assert vqa_accuracy("the cat", answers) == pytest.approx(expected)


def test_vqa_an_empty_prediction_agrees_with_answers_of_nothing():
    assert vqa_accuracy("", ["the", "?", ".", "a"] + ["x"] * 6) == 1.0
    assert vqa_accuracy("", ["x"] * 10) == 0.0


@pytest.mark.parametrize("count", [0, 1, 9, 11])
def test_vqa_accuracy_takes_ten_answers(count):
    with pytest.raises(DataError, match=f"{count} answers; exactly 10"):
        vqa_accuracy("x", ["x"] * count)


def leave_one_out(prediction: str, answers: list[str]) -> float:
    """The definition: for each person, how far the other nine agree with the prediction."""
    said, normal = vqa_normalize(prediction), [vqa_normalize(answer) for answer in answers]
    if said not in normal:
        return 0.0
    return sum(min(1.0, sum(other == said for j, other in enumerate(normal) if j != i) / 3) for i in range(10)) / 10


@given(
    st.sampled_from(["a", "cat", "Dog", "two", "2"]),
    st.lists(st.sampled_from(["a", "cat", "dog.", "2", "the"]), min_size=10, max_size=10),
)
def test_vqa_accuracy_is_the_mean_over_people(prediction, answers):
    value = vqa_accuracy(prediction, answers)
    assert value == pytest.approx(leave_one_out(prediction, answers))
    assert value == vqa_accuracy(prediction, sorted(answers))


# --- one's own --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [("Red.", ["red"], 1.0), ("  RED ", ["blue", "red"], 1.0), ("a red", ["red"], 0.0), ("", ["red"], 0.0)],
)
def test_exact_match(prediction, references, expected):
    assert exact_match(prediction, references) == expected


def test_consensus_of_any_number():
    assert vqa_consensus("the cat", ["Cat"]) == 1.0
    assert vqa_consensus("cat", ["cat", "dog"]) == 0.5
    assert vqa_consensus("cat", ["cat", "dog", "dog", "cow", "cow"]) == pytest.approx(1 / 3)
    assert vqa_consensus("cat", ["cat"] + ["dog"] * 9) == pytest.approx(0.3)
    assert vqa_consensus("cat", []) == 0.0


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("B", True),
        ("b", True),
        ("(B)", True),
        ("b.", True),
        ("B. a dog", True),
        ("b) a dog", True),
        ("The answer is B", True),
        ("The correct option: (B)", True),
        ("It is B, I think", True),
        ("A dog is B", False),
        ("A", False),
        ("Bob", False),
        ("both A and B", False),
        ("", False),
        ("I would say B", True),
        ("the answer is big", False),
    ],
)
def test_choice_letter(prediction, right):
    assert choice_letter(prediction, ["B"]) == right
    assert choice_letter(prediction, ["(b)"]) == right


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Yes.", 1.0),
        ("YES, it is", 1.0),
        ("Well, yes", 1.0),
        ("No", 0.0),
        ("yesterday", 0.0),
        ("no, yes", 0.0),
        ("", 0.0),
    ],
)
def test_yes_no(prediction, expected):
    assert yes_no(prediction, ["Yes"]) == expected


@pytest.mark.parametrize(
    ("scorer", "references", "message"),
    [
        (choice_letter, ["AB"], "is no letter"),
        (yes_no, ["maybe"], "'yes' and 'no'"),
        (numeric, ["two"], "holds 0 numbers"),
        (numeric, ["1 2"], "2 numbers"),
        # Every number was right by a reference without end.
        (numeric, ["1e999"], "too large"),
        (numeric, ["9" * 400], "too large"),
    ],
)
def test_references_that_a_scorer_cannot_use(scorer, references, message):
    with pytest.raises(DataError, match=message):
        scorer("x", references)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("Hello  World", "hello world", 1.0),
        ("ab", "ac", 0.5),
        ("abc", "axy", 0.0),
        ("", "abc", 0.0),
        ("", "", 1.0),
    ],
)
def test_anls(prediction, reference, expected):
    assert anls(prediction, [reference]) == pytest.approx(expected)
    assert anls(prediction, ["zzzzzzzzzzzz", reference]) == pytest.approx(expected)


@given(st.text("abc", max_size=8), st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edits_are_a_distance(one, other, third):
    assert (edits(one, other) == 0) == (one == other)
    assert edits(one, other) == edits(other, one)
    assert abs(len(one) - len(other)) <= edits(one, other) <= max(len(one), len(other))
    assert edits(one, third) <= edits(one, other) + edits(other, third)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("It is a Red  Kite!", 1.0), ("red kites", 0.0), ("infrared kite", 0.0), ("kite red", 0.0), ("", 0.0)],
)
def test_contains(prediction, expected):
    assert contains(prediction, ["red kite"]) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("100", "100", 1.0),
        ("105", "100", 1.0),
        ("105.1", "100", 0.0),
        ("-95", "-100", 1.0),
        ("95", "-100", 0.0),
        ("$1,234.50", "1234.5", 1.0),
        ("about 12 %", "12%", 1.0),
        ("12.", "12", 1.0),
        ("1e3", "1000", 1.0),
        ("\N{MINUS SIGN}3", "-3", 1.0),
        (".5", "0.5", 1.0),
        ("0", "0", 1.0),
        ("0.01", "0", 0.0),
        ("between 3 and 4", "3", 0.0),
        ("three", "3", 0.0),
        ("B12", "12", 0.0),
        ("", "3", 0.0),
    ],
)
def test_numeric(prediction, reference, expected):
    assert numeric(prediction, [reference]) == expected


def test_numeric_tolerances():
    assert numeric("9", ["10"], relative=0) == 0.0
    assert numeric("9", ["10"], relative=0, absolute=1) == 1.0
    assert numeric("3", ["7", "3"], relative=0) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The red kite.", "a red kite", 1.0),
        ("red kite", "red bird", 0.5),
        ("red red", "red", 2 / 3),
        ("", "red", 0.0),
        ("the", "", 1.0),
        ("blue", "red", 0.0),
    ],
)
def test_word_f1(prediction, reference, expected):
    assert word_f1(prediction, [reference]) == pytest.approx(expected)


USABLE = {"choice": ["B"], "yes_no": ["no"], "numeric": ["3.5"]}
"""References for scorers that do not take every text."""


@pytest.mark.parametrize("name", SCORERS)
@given(prediction=ANYTHING | WORDS)
def test_every_scorer_gives_a_share_and_full_marks_to_the_reference(name, prediction):
    references = USABLE.get(name, ["red kite"])
    assert 0 <= SCORERS[name](prediction, references) <= 1
    assert SCORERS[name](references[0], references) == 1


def test_scorers_and_benchmarks_import_no_torch():
    code = (
        "import sys, align_ti.evaluation.scoring\n"
        "from align_ti.evaluation.benchmarks import BENCHMARKS, benchmark\n"
        "[benchmark(name) for name in BENCHMARKS]\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
