"""The features of Hugging Face datasets: what they say of the columns of a table."""

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["classes_of", "features_of"]


def features_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features of a Hugging Face dataset, which it keeps in the metadata of a schema; {} where there are none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def classes_of(features: Mapping[str, Any], sources: Mapping[str, str]) -> list[str] | None:
    """The names of the classes: of the one column that has any, or of that which is called label."""
    found = {}
    for name, source in sources.items():
        feature = features.get(source)
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            names = feature.get("names")
            if isinstance(names, list) and all(isinstance(one, str) for one in names):
                found[name] = names
    for name in ("label", "labels", "class"):
        if name in found:
            return found[name]
    return next(iter(found.values())) if len(found) == 1 else None
