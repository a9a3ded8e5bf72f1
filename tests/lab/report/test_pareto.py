"""The front against the definition of dominance, point by point."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.lab.report.scatter import pareto_front

# Few distinct values, so that ties in one or both coordinates are common.
values = st.integers(-3, 3).map(float) | st.floats(allow_nan=False) | st.just(float("nan"))


def dominates(p, q, sign):
    better = [p[0] <= q[0], sign * p[1] <= sign * q[1]]
    return all(better) and (p[0] < q[0] or sign * p[1] < sign * q[1])


@given(st.lists(st.tuples(values, values), max_size=30), st.booleans())
def test_front_is_what_no_point_dominates(points, higher):
    sign = -1.0 if higher else 1.0
    known = [i for i, p in enumerate(points) if p[0] == p[0] and p[1] == p[1]]
    expected = {i for i in known if not any(dominates(points[j], points[i], sign) for j in known)}
    front = pareto_front(points, higher_is_better=higher)
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)
