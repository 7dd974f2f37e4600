"""The hybrid cascade: answers from the device, from the cloud only when it pays, and never none for want of one."""

from edgeft.cascade.engine import Cascade
from edgeft.cascade.settings import Settings, is_cascade, read_settings
from edgeft.cascade.types import LOCAL, CascadeDelta, Record

__all__ = ["LOCAL", "Cascade", "CascadeDelta", "Record", "Settings", "is_cascade", "read_settings"]
