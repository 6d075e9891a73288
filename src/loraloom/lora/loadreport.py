"""What loading an adapter found and did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """What became of each tensor of a file. Keys are PEFT's."""

    used: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    #: key → (dtype in the file, dtype in the model)
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    #: key in the file → key that it was read as
    renamed: dict[str, str] = field(default_factory=dict)
    #: repeats of other tensors and of the base's biases, which PEFT writes for bias="all"; left out
    repeated: list[str] = field(default_factory=list)
    #: embeddings of the base that the file carries along and that were put into the base, as PEFT does
    base_replaced: list[str] = field(default_factory=list)
    #: of modules that are never called, where an adapter does nothing; left out
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    #: fields of ``adapter_config.json`` that were left out, and why
    notes: list[str] = field(default_factory=list)

    # PEFT's names for the two lists.
    @property
    def missing_keys(self) -> list[str]:
        return self.missing

    @property
    def unexpected_keys(self) -> list[str]:
        return self.unexpected

    def __str__(self) -> str:
        parts = [f"{len(self.used)} tensors used"]
        for words, entries in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("converted to another dtype", self.dtypes),
            ("renamed", self.renamed),
            ("repeated", self.repeated),
            ("put into the base", self.base_replaced),
            ("skipped, because the model never calls their modules", self.skipped),
        ):
            if entries:
                parts.append(f"{len(entries)} {words}")
        return ", ".join(parts)
