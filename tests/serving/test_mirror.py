"""What a mirror deletes. What it fetches is in tests/end_to_end/test_object_store.py."""

from pathlib import Path

import sqlalchemy as sa

from serving.mirror import remove_others
from serving.registry import Registry
from store.records import Manifest, ReportCard
from store.settings import Settings


def test_only_what_this_registry_has_given_up_is_deleted(engine: sa.Engine, tmp_path: Path) -> None:
    settings, registry = Settings(home=tmp_path), Registry(engine)
    for number in (1, 2):
        registry.reserve("m", None, Manifest(classes=("a",)), ReportCard())
        registry.go_live("m", number)
    registry.retire("m", 1)
    registry.forget("m", 1)
    for model, name in (("m", "1"), ("m", "2"), ("m", "3"), ("m", "2.bak"), ("of-another-registry", "1")):
        (settings.models / model / name).mkdir(parents=True)
    remove_others(settings, registry)
    left = sorted(str(path.relative_to(settings.models)) for path in settings.models.glob("*/*"))
    assert left == ["m/2", "m/2.bak", "m/3", "of-another-registry/1"]
