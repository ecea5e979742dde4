"""Every error of ours has a code and a status of its own kind."""

from api.http.errors import STATUS, status_of
from store import errors


def kinds() -> list[type[errors.TemperError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TemperError)]
    assert len(found) > 15
    return found


def unmapped() -> list[str]:
    """Errors, wherever they are defined, for which nobody has chosen a status."""
    found, todo = [], errors.TemperError.__subclasses__()
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if not any(base in STATUS for base in kind.__mro__ if base is not errors.TemperError):
            found.append(kind.__name__)
    return found


def test_every_error_has_a_status_that_somebody_chose() -> None:
    import api.app  # noqa: F401  # with all that the gateway can raise

    assert unmapped() == []

    class Forgotten(errors.TemperError):
        code = "forgotten"

    assert unmapped() == ["Forgotten"]


def test_codes_are_distinct() -> None:
    assert len({kind.code for kind in kinds()}) == len(kinds())


def test_every_error_that_a_client_can_cause_is_mapped_below_500() -> None:
    inside = (
        errors.ModelServerError, errors.StoreUnavailable, errors.StorageFull, errors.StorageFailed, errors.JobFailed
    )  # fmt: skip
    for kind in kinds():
        status = status_of(kind("text"))
        if kind is errors.TemperError or issubclass(kind, inside):
            assert status >= 500, kind
        else:
            assert 400 <= status < 500, kind


def test_the_table_names_no_class_twice_and_no_stranger() -> None:
    assert set(STATUS) <= set(kinds())
