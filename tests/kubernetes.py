"""What the API of Kubernetes takes.

`kubernetes_schema.json` holds the schemas of the kinds, pinned: what it says of itself tells where
they are from. A key that they do not name is an error, as for `kubectl apply`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs

SCHEMAS = json.loads(Path(__file__).with_name("kubernetes_schema.json").read_text())


def faults(manifest: dict[str, Any]) -> list[str]:
    """Of a manifest, by its schema."""
    kind = SCHEMAS["kinds"][f"{manifest['apiVersion']}/{manifest['kind']}"]
    schema = {"$ref": f"#/$defs/{kind}", "$defs": SCHEMAS["$defs"]}
    errors = jsonschema_rs.validator_for(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.instance_path))}: {error.message}" for error in errors]
