"""Every kind of fault, by name."""

from tests.chaos.kinds import disks, elsewhere, fuzz, gpus, hostile, kills, scarce, shared, tampering, tracking
from tests.chaos.ledger import Kind

KINDS: dict[str, Kind] = {
    **kills.KINDS,
    **tampering.KINDS,
    **disks.KINDS,
    **scarce.KINDS,
    **tracking.KINDS,
    **gpus.KINDS,
    **hostile.KINDS,
    **shared.KINDS,
    **elsewhere.KINDS,
    **fuzz.KINDS,
}
