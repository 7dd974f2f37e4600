"""A software bill of materials: CycloneDX 1.6 (ecma-international ECMA-424), JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeft import __version__
from edgeft.artifact import Artifact
from edgeft.paths import sha256_file

from .wheels import Wheel

FILE = "sbom.cdx.json"


def document(name: str, version: str, artifacts: Sequence[Artifact], wheels: Sequence[Wheel]) -> str:
    """The model, its adapters and every wheel, with digests and licences."""
    value = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "edgeft", "version": __version__}]},
            "component": {"type": "application", "bom-ref": "bundle", "name": name, "version": version},
        },
        "components": [*(_model(artifact) for artifact in artifacts), *(_package(wheel) for wheel in wheels)],
    }
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _model(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    value: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": artifact.path.name,
        "name": artifact.path.name,
    }
    if manifest:
        value["hashes"] = [{"alg": "SHA-256", "content": manifest.sha256}]
        value |= _licences(manifest.licence)
    return value


def _package(wheel: Wheel) -> dict[str, Any]:
    purl = f"pkg:pypi/{wheel.name.lower().replace('_', '-')}@{wheel.version}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": wheel.name,
        "version": wheel.version,
        "purl": purl,
        "hashes": [{"alg": "SHA-256", "content": sha256_file(wheel.file)}],
        **_licences(wheel.licence),
    }


def _licences(name: str | None) -> dict[str, Any]:
    return {"licenses": [{"license": {"name": name}}]} if name else {}


def write(folder: Path, text: str) -> None:
    (folder / FILE).write_text(text, encoding="utf-8")
