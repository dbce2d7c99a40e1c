import pytest

from guard.reader.sequence import WindowPlan


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 28, 29, 100, 1000])
def test_windows_cover_every_token_once_with_context(length, sink):
    plan = WindowPlan(size=16, overlap=4)
    windows = list(plan.cover(length, sink=sink))
    scored = [i for w in windows for i in range(w.fresh, w.end)]
    assert scored == list(range(length))
    assert all(w.end - w.begin + w.sink <= 16 for w in windows)
    assert all(w.fresh - w.begin == 4 for w in windows[1:])


def test_a_stream_meets_the_same_windows_as_the_whole_text():
    plan = WindowPlan(size=16, overlap=4)
    window = plan.first(sink=True)
    for expected in list(plan.cover(100, sink=True))[:-1]:
        assert window == expected
        window = plan.after(window)
