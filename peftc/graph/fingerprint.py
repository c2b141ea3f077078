"""What two models must share for a plan of one to hold for the other."""

import hashlib

from peftc.graph.sites import SiteIndex, dtype_name


def fingerprint(index: SiteIndex) -> str:
    """A hash of the model's structure: module names and classes, parameter names, shapes and dtypes, ties.

    Reads no weights. 16 hex digits of blake2b.
    """
    digest = hashlib.blake2b(digest_size=8)
    for fqn, name in index.modules.items():
        digest.update(f"{fqn}={name};".encode())
    for name, shape, dtype in index.parameters:
        digest.update(f"{name}:{shape}:{dtype_name(dtype)};".encode())
    digest.update(repr(sorted(index.ties)).encode())
    return digest.hexdigest()
