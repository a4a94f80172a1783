"""What `sdft doctor` says about one thing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    what: str
    problem: str | None
    """None where all is well."""
    mend: str = ""
    is_warning: bool = False
    """`sdft up` works all the same."""

    @property
    def hinders(self) -> bool:
        return self.problem is not None and not self.is_warning
