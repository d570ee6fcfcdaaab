"""Every kind of fault, by name."""

from tests.chaos.kinds import kills
from tests.chaos.ledger import Kind

KINDS: dict[str, Kind] = {
    **kills.KINDS,
}
