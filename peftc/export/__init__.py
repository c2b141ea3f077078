"""Models that leave: checkpoints and programs for runtimes, each with a certificate of what it was compared with."""

from peftc.export.certificate import Certificate
from peftc.export.preflight import Verdict, preflight
from peftc.export.programs import export
from peftc.export.verify import verify

__all__ = ["Certificate", "Verdict", "export", "preflight", "verify"]
