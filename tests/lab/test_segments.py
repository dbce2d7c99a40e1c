"""Segments: each clause of the rule by hand."""

import pytest

from guard.lab.explain.segments import cut, peaks


def shown(tokens, size=8):
    return ["".join(tokens[start:end]) for start, end in cut(tokens, size)]


def words(text):
    """One token a word, with the blank before it; punctuation apart."""
    import re

    return re.findall(r" ?\w+|[^\w\s]|\s", text)


def test_a_window_within_reach_stays_whole():
    tokens = words("The ferry left at noon. It came back at night.")
    assert len(tokens) == 12
    assert shown(tokens) == ["The ferry left at noon. It came back at night."]
    assert cut([], 8) == []
    assert cut(["word"], 8) == [(0, 1)]


def test_a_sentence_s_end_goes_before_a_comma_and_a_comma_before_a_blank():
    tokens = words("The ferry left at noon. It came back at night, with nobody but the pilot on board")
    # 18 tokens, so a first segment of 4 to 12: the full stop stands behind 6, the comma behind 12.
    assert shown(tokens) == [
        "The ferry left at noon.",
        " It came back at night,",
        " with nobody but the pilot on board",
    ]
    tokens = words("The ferry left at noon with nobody, but the pilot and his old dog were on board")
    assert shown(tokens) == ["The ferry left at noon with nobody,", " but the pilot and his old dog were on board"]


def test_of_equal_cuts_the_nearest_to_the_size_and_the_earlier_of_two():
    tokens = words("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")
    assert [end - start for start, end in cut(tokens, 8)] == [8, 8]
    assert [end - start for start, end in cut(tokens, 4)] == [4, 4, 4, 4]
    commas = words("a b c d e, f g h, i j k l m n o p")
    # Behind the commas: 6 and 10 tokens, both 2 away from 8.
    assert shown(commas)[0] == "a b c d e,"


def test_never_inside_a_word_nor_a_number():
    tokens = [
        "In",
        "com",
        "pre",
        "hen",
        "si",
        "bil",
        "i",
        "ties",
        " of",
        " 1",
        "0",
        ",",
        "5",
        "0",
        "0",
        " kind",
        "s",
        ".",
    ]
    # Blanks within reach stand behind 8, 9 and 15 tokens, but 15 would leave only 3.
    assert shown(tokens) == ["Incomprehensibilities", " of 10,500 kinds."]


def test_a_segment_runs_on_where_no_cut_is_within_reach():
    tokens = ["ab"] * 20 + [" then", " some", " more", " words"]
    assert shown(tokens) == ["ab" * 20, " then some more words"]
    assert shown(["ab"] * 30) == ["ab" * 30]
    # The one blank would leave a rest of one token: the segment takes it in.
    assert shown(["ab"] * 20 + [" then"]) == ["ab" * 20 + " then"]


def test_no_segment_is_shorter_than_half_the_size():
    tokens = words("one two three four five six seven eight nine ten eleven twelve. Thirteen")
    # The full stop would leave a rest of one token.
    assert [end - start for start, end in cut(tokens, 8)] == [8, 6]


def test_chinese_is_cut_behind_its_own_punctuation_and_nowhere_else():
    tokens = list("渡轮中午开走了，晚上才回来。船上除了一位老船长以外再没有别的人")  # noqa: RUF001 - Chinese punctuation
    assert shown(tokens) == ["渡轮中午开走了，", "晚上才回来。", "船上除了一位老船长以外再没有别的人"]  # noqa: RUF001 - Chinese punctuation


def test_a_closing_quotation_mark_stays_with_its_sentence():
    tokens = list("他说：“渡轮今天不来了。”大家只好在岸边等到天亮才走")  # noqa: RUF001 - Chinese punctuation
    assert shown(tokens) == ["他说：“渡轮今天不来了。”", "大家只好在岸边等到天亮才走"]  # noqa: RUF001 - Chinese punctuation
    tokens = words('He said "the ferry will not come." We all waited on the shore until dawn')
    assert shown(tokens) == ['He said "the ferry will not come."', " We all waited on the shore until dawn"]


def test_a_line_s_end_is_a_sentence_s_end():
    tokens = words("Ferries of today\nThe first one leaves at six, the last one at nine in the evening")
    assert shown(tokens)[0] == "Ferries of today\n"


def test_the_truth_of_a_segment_is_its_greatest_strength():
    assert peaks([0, 0.5, 0.2, 0, 0, 0, 1.5], [(0, 3), (3, 5), (5, 7)]) == [0.5, 0, 1.5]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
def test_segments_cover_the_window(size):
    english = "A ferry, e.g. this one, costs 3.50 a ride; bicycles are free!\n\nDogs... well, dogs pay half. "
    tokens = words(english + "船票五元，狗半价。")  # noqa: RUF001 - Chinese punctuation
    spans = cut(tokens, size)
    assert [token for start, end in spans for token in tokens[start:end]] == tokens
    assert all(start < end for start, end in spans)
