"""Ed25519 signatures of a bundle's manifest (RFC 8032), with keys in PEM as openssl writes them.

The manifest lists the digest of every file, so its signature covers the whole bundle.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from edgeft.bundle import MANIFEST, SIGNATURE
from edgeft.errors import CheckFailed, UsageError, require
from edgeft.paths import write_text

EXTRA = "deploy"
_MAKE = "edgeft package --new-key FILE makes a pair."


def make_keys(private: Path) -> Path:
    """Write a new key pair: `private` (readable by its owner only) and `private`.pub.

    Raises:
        UsageError: one of the files exists.
        MissingDependency: `cryptography` is not installed.
    """
    serialization = require("cryptography.hazmat.primitives.serialization", EXTRA)
    ed25519 = require("cryptography.hazmat.primitives.asymmetric.ed25519", EXTRA)
    public = private.with_name(private.name + ".pub")
    for file in (private, public):
        if file.exists():
            raise UsageError(f"{file} exists", "Choose another name; keys are never overwritten.")
    key = ed25519.Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    private.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(secret)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    write_text(public, key.public_key().public_bytes(serialization.Encoding.PEM, form).decode())
    return public


def sign(folder: Path, private: Path) -> None:
    """Sign the manifest in `folder`. Raises: UsageError when the key cannot be used, MissingDependency."""
    key = _load(private, "load_pem_private_key", "Ed25519PrivateKey", password=None)
    signature = key.sign((folder / MANIFEST).read_bytes())
    write_text(folder / SIGNATURE, base64.b64encode(signature).decode() + "\n")


def verify(folder: Path, public: Path) -> None:
    """Raises: CheckFailed when there is no signature or it is wrong; UsageError, MissingDependency."""
    exceptions = require("cryptography.exceptions", EXTRA)
    key = _load(public, "load_pem_public_key", "Ed25519PublicKey")
    file = folder / SIGNATURE
    if file.is_symlink() or not file.is_file() or file.stat().st_size > 4096:
        raise CheckFailed(f"{folder} is not signed", "Ask for a signed bundle, or install without --key.")
    try:
        key.verify(base64.b64decode(file.read_bytes().strip(), validate=True), (folder / MANIFEST).read_bytes())
    except (exceptions.InvalidSignature, ValueError) as error:
        raise CheckFailed(f"{folder} is not signed with {public}", "Do not use this bundle.") from error


def _load(file: Path, loader: str, kind: str, **options: Any) -> Any:
    serialization = require("cryptography.hazmat.primitives.serialization", EXTRA)
    ed25519 = require("cryptography.hazmat.primitives.asymmetric.ed25519", EXTRA)
    try:
        key = getattr(serialization, loader)(file.read_bytes(), **options)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{file} is not a usable key: {error}", "edgeft package --new-key FILE makes a pair."
        ) from error
    if not isinstance(key, getattr(ed25519, kind)):
        raise UsageError(f"{file} is not an ed25519 key", _MAKE)
    return key
