"""Signatures of folders by keys of one's own, in the format of OpenSSF Model Signing; nothing goes over a network.

Hashes tell damage. Whoever may write to a store can mend them, but cannot sign without the private key. Both keys are
named by environment variables: what a store says of itself is no reason to trust it.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.storage.files import new_file
from lifelong_moe.storage.grammars import Sha256
from lifelong_moe.storage.opening import open_regular, read_bounded
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.stored import read_stored

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from model_signing.hashing import Config as Hashing

PRIVATE = "LIFELONG_MOE_PRIVATE_KEY"
"""Environment variable: file of the private key that signs."""
PUBLIC = "LIFELONG_MOE_PUBLIC_KEY"
"""Environment variable: files of the public keys that are trusted, separated like those of ``PATH``."""
CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MOST_KEY_BYTES = 1 << 16


@dataclass(frozen=True)
class SigningKeys:
    """The key that signs and those that are trusted; without either nothing is signed, or verified."""

    private: Path | None = None
    """PEM file of the private key."""
    public: Mapping[str, Path] = field(default_factory=dict)
    """PEM file of each trusted public key, by its fingerprint."""

    @classmethod
    def from_environment(cls) -> SigningKeys:
        """The keys that the environment names.

        Raises:
            ConfigError: If one cannot be used, or the extra ``signing`` is not installed.
        """
        named = {name: os.environ[name] for name in (PRIVATE, PUBLIC) if name in os.environ}
        if not named:
            return cls()
        for name, value in named.items():
            # An unset shell variable is the usual cause, and must not switch verification off.
            if not value.strip(os.pathsep):
                raise ConfigError(f"{name} is empty; name a PEM file, or unset it.")
        if find_spec("model_signing") is None:
            raise ConfigError(f"{next(iter(named))} is set, which needs the extra: pip install 'lifelong-moe[signing]'")
        paths = [Path(path) for path in named.get(PUBLIC, "").split(os.pathsep) if path]
        public = {fingerprint(_public_key(path)): path for path in paths}
        if PRIVATE not in named:
            return cls(public=public)
        private = Path(named[PRIVATE])
        own = fingerprint(_public_half(private))
        if public and own not in public:
            # It would sign what is then refused.
            raise ConfigError(f"{PRIVATE}={private} is of the key {own[:16]}, which {PUBLIC} does not name.")
        return cls(private, public)

    def sign(self, folder: Path, signature: Path) -> None:
        """Sign every file of a folder, if there is a private key.

        Args:
            folder: What is signed; its files must not change any more.
            signature: File of the signature, outside the folder; replaced if it exists.
        """
        if self.private is None:
            return
        # Imported on use: it takes more than a second, and only few need it.
        from model_signing.signing import Config

        signing = Config().use_elliptic_key_signer(private_key=self.private).set_hashing_config(_every_file())
        with new_file(signature) as work:
            signing.sign(folder, work)

    def verify(self, folder: Path, signature: Path, read: Mapping[str, str] | None = None) -> None:
        """Require that a trusted key has signed exactly the files that a folder holds; nothing without public keys.

        Args:
            folder: What was signed.
            signature: File of its signature.
            read: SHA-256 by file name of what the caller reads, which must be what was signed, also if somebody
                replaces files meanwhile; None leaves that open.

        Raises:
            CorruptError: If the signature is missing, of another key, or of other files.
        """
        if not self.public:
            return
        bundle = _read_bundle(signature)
        if bundle is None:
            raise CorruptError(f"{folder}: not signed, but {PUBLIC} is set. Unset it only if you trust this store.")
        signer = bundle.verificationMaterial.publicKey.hint
        if signer not in self.public:
            raise CorruptError(f"{folder}: signed by the key {signer[:16]}, which {PUBLIC} does not name.")
        try:
            signed = _verified(folder, bundle, self.public[signer])
        # The signature is anybody's, and the library raises whatever its parsers do. Only silence means verified.
        except Exception as error:
            raise CorruptError(
                f"{folder}: not what {signer[:16]} signed ({str(error) or 'wrong signature'})."
            ) from None
        for name, digest in (read or {}).items():
            if signed.get(name) != digest:
                raise CorruptError(f"{folder}: not what {signer[:16]} signed ({name} was replaced meanwhile).")


@dataclass(frozen=True)
class _Key:
    hint: Sha256


@dataclass(frozen=True)
class _Material:
    publicKey: _Key
    tlogEntries: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _One:
    sig: str
    keyid: str = ""


@dataclass(frozen=True)
class _Envelope:
    payload: str
    payloadType: str
    signatures: tuple[_One, ...]


@dataclass(frozen=True)
class _Bundle:
    """A signature file, in Sigstore's names: of a bundle, those fields that a signature by a key has."""

    mediaType: str
    verificationMaterial: _Material
    dsseEnvelope: _Envelope


def signed_by(signature: Path) -> str | None:
    """Fingerprint of the key that a signature claims to be of; None if there is no signature. Nothing is verified.

    Raises:
        CorruptError: If the file is no signature.
    """
    bundle = _read_bundle(signature)
    return None if bundle is None else bundle.verificationMaterial.publicKey.hint


def _read_bundle(signature: Path) -> _Bundle | None:
    try:
        return read_stored(signature, partial(from_plain, _Bundle))
    except FileNotFoundError:
        return None


def _verified(folder: Path, bundle: _Bundle, key: Path) -> dict[str, str]:
    """SHA-256 of each signed file, once the library has found nothing wrong."""
    from model_signing.verifying import Config

    # Strict: a decoder that passes over foreign characters might see another text than the library's.
    payload = base64.b64decode(bundle.dsseEnvelope.payload, validate=True)
    verifying = Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(_every_file())
    # A copy of what was read above, so that the library and we read the same, whatever stands there by now.
    with tempfile.TemporaryDirectory() as private:
        copy = Path(private) / "bundle.sig"
        copy.write_text(json.dumps(dataclasses.asdict(bundle)), encoding="utf-8")
        verifying.verify(folder, copy)
    return {file["name"]: file["digest"] for file in json.loads(payload)["predicate"]["resources"]}


def fingerprint(key: EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key in PEM, as ``sha256sum`` prints it of the file that OpenSSL writes."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _every_file() -> Hashing:
    """Hash all files, also those of git, which the library leaves out by default, and no links."""
    from model_signing.hashing import Config

    return Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def _public_key(path: Path) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return _supported(load_pem_public_key(_read(PUBLIC, path)), PUBLIC, path)
    except ValueError:
        raise ConfigError(f"{PUBLIC}={path}: not a public key in PEM.") from None


def _public_half(path: Path) -> EllipticCurvePublicKey:
    """The public key that belongs to a private one."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    # Messages say nothing of what the file holds.
    try:
        key = load_pem_private_key(_read(PRIVATE, path), password=None)
    except TypeError:
        raise ConfigError(
            f"{PRIVATE}={path}: encrypted; only a key without a passphrase can sign unattended."
        ) from None
    except ValueError:
        raise ConfigError(f"{PRIVATE}={path}: not a private key in PEM.") from None
    return _supported(key.public_key(), PRIVATE, path)


def _supported(key: object, name: str, path: Path) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise ConfigError(f"{name}={path}: not an elliptic-curve key of {', '.join(CURVES)}.")
    return key


def _read(name: str, path: Path) -> bytes:
    """A key file that the user names.

    Raises:
        ConfigError: If it cannot be read, or is a private key which everybody can.
    """
    try:
        if name == PRIVATE:
            with open_regular(path, follow=True) as file:
                if os.fstat(file.fileno()).st_mode & 0o007:
                    raise ConfigError(f"{name}={path}: everybody on this machine can use it; chmod o= {path}")
        return read_bounded(path, _MOST_KEY_BYTES, follow=True)
    except OSError as error:
        raise ConfigError(f"{name}={path}: {error.strerror}.") from None
