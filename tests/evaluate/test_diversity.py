"""Distinct-n and self-BLEU of the responses of a report."""

from jaxrlhf.evaluate.diversity import diversity


def test_the_report_has_no_number_for_nothing():
    found = diversity([{"response": ""}, {"response": "a b"}])
    assert found == {"distinct_1": 1.0, "distinct_2": 1.0, "distinct_3": None, "self_bleu": None}
