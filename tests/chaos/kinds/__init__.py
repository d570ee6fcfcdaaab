"""Every kind of fault, by name."""

from tests.chaos.kinds import disks, kills, tampering
from tests.chaos.ledger import Kind

KINDS: dict[str, Kind] = {**kills.KINDS, **tampering.KINDS, **disks.KINDS}
