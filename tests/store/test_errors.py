"""Every error of ours has a code and a status of its own kind."""

from api.http.errors import STATUS, status_of
from store import errors


def kinds() -> list[type[errors.TemperError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TemperError)]
    assert len(found) > 15
    return found


def test_codes_are_distinct() -> None:
    assert len({kind.code for kind in kinds()}) == len(kinds())


def test_every_error_that_a_client_can_cause_is_mapped_below_500() -> None:
    inside = (errors.ModelServerError, errors.StoreUnavailable, errors.StorageFull, errors.JobFailed)
    for kind in kinds():
        status = status_of(kind("text"))
        if kind is errors.TemperError or issubclass(kind, inside):
            assert status >= 500, kind
        else:
            assert 400 <= status < 500, kind


def test_the_table_names_no_class_twice_and_no_stranger() -> None:
    assert set(STATUS) <= set(kinds())
