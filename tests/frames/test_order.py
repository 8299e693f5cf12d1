import pandas as pd

from llm_dynamics.frames import ordered
from llm_dynamics.frames.order import GREEDY, KNOWN, in_order
from llm_dynamics.probes import FAMILY_ORDER
from llm_dynamics.report.families import STYLES


def test_the_order_is_that_of_the_probes_and_of_the_styles():
    assert KNOWN == FAMILY_ORDER
    assert [*KNOWN, *GREEDY] == list(STYLES)


def test_unknown_families_come_between_the_known_and_the_greedy():
    assert ordered(["argmax", "b", "rejected", "a", "chosen", "a"]) == ["chosen", "rejected", "a", "b", "argmax"]


def test_rows_are_sorted_by_family_and_then_by_what_is_asked_for():
    frame = pd.DataFrame({"family": ["zebra", "chosen", "zebra"], "step": [5, 5, 0]})
    assert in_order(frame, "step").to_dict("list") == {"family": ["chosen", "zebra", "zebra"], "step": [5, 0, 5]}
