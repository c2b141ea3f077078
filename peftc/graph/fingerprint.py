"""What two models must share for a plan of one to hold for the other."""

import hashlib

from torch import nn

from peftc.graph.sites import SiteIndex, dtype_name


def fingerprint(model: nn.Module, index: SiteIndex) -> str:
    """A hash of the model's structure: names, classes and options (extra_repr) of modules, names, shapes and dtypes of
    parameters and buffers, ties.

    Reads no weights, and no device. 16 hex digits of blake2b.
    """
    digest = hashlib.blake2b(digest_size=8)
    for fqn, module in model.named_modules():
        digest.update(f"{fqn}={index.modules[fqn]}({module.extra_repr()});".encode())
    for name, shape, dtype in index.parameters:
        digest.update(f"{name}:{shape}:{dtype_name(dtype)};".encode())
    for name, buffer in model.named_buffers():
        digest.update(f"{name}:{tuple(buffer.shape)}:{dtype_name(buffer.dtype)};".encode())
    digest.update(repr(sorted(index.ties)).encode())
    return digest.hexdigest()
