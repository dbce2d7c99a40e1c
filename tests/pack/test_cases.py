from guard.pack.cases import CaseResult, replay
from guard.pack.manifest import CaseLine
from guard.records import Action


def case(expect, domain="violence", text="a text"):
    return CaseLine(id=f"{domain}/{expect}", lang="en", text=text, domain=domain, expect=expect)


def passed(expect, action):
    given = case(expect)
    [result] = replay([given], lambda _: {"violence": action, "terror": Action.BLOCK})
    assert result == CaseResult(given, action, result.passed)
    return result.passed


def test_a_text_to_act_on_passes_where_it_is_flagged_or_blocked():
    assert [passed("act", action) for action in Action] == [False, True, True, False]


def test_a_text_to_allow_passes_where_it_is_allowed():
    assert [passed("allow", action) for action in Action] == [True, False, False, False]


def test_a_domain_without_an_answer_counts_as_not_assessed_and_never_passes():
    results = replay([case("act"), case("allow")], lambda _: {"terror": Action.ALLOW})
    assert [(result.action, result.passed) for result in results] == [(Action.NOT_ASSESSED, False)] * 2


def test_each_case_is_judged_by_its_own_text_and_domain_in_order():
    answers = {
        "knife": {"violence": Action.FLAG, "terror": Action.ALLOW},
        "news": {"violence": Action.ALLOW, "terror": Action.BLOCK},
    }
    cases = [case("act", "violence", "knife"), case("allow", "terror", "knife"), case("allow", "terror", "news")]
    results = replay(cases, answers.__getitem__)
    assert [result.case for result in results] == cases
    assert [result.passed for result in results] == [True, True, False]
