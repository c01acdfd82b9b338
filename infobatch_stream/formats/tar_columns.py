"""The columns of tar members, by the columns.json beside the tars and by extensions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from infobatch_stream.formats.extensions import is_image, split_prefix
from infobatch_stream.formats.schema import KEY, MEMBERS, Column

__all__ = ["IMAGES", "TarColumns"]

IMAGES = ("jpeg", "png")  # encodings


@dataclass(frozen=True)
class TarColumns:
    """The columns of tars. declared: those in columns.json; empty if there is none."""

    declared: Mapping[str, Column] = field(default_factory=dict)

    @property
    def extensions(self) -> dict[str, list[str]]:
        """The extensions of each column."""
        return {name: column.wds.split(";") for name, column in self.declared.items() if name not in (KEY, MEMBERS)}

    @property
    def differ(self) -> bool:
        """Whether columns.json says that samples have different members."""
        return MEMBERS in self.declared

    def meant(self, name: str, there: Iterable[str]) -> list[str]:
        """The extensions among ``there`` that ``name`` means: it is a column, an extension, or several as jpg;png."""
        if name in self.extensions:
            return [extension for extension in there if self.owner(extension) == name]
        return [extension for extension in there if extension in name.split(";")]

    def owner(self, extension: str) -> str | None:
        """The column of a member. Images may have other extensions than columns.json lists for their column."""
        columns = self.extensions
        found = next((name for name, extensions in columns.items() if extension in extensions), None)
        if found is not None or not is_image(extension):
            return found
        prefix = split_prefix(extension)[0]
        fitting = [
            name
            for name, extensions in columns.items()
            if self.declared[name].mds in IMAGES and split_prefix(extensions[0])[0] == prefix
        ]
        return fitting[0] if len(fitting) == 1 else None

    def owned(self, there: Iterable[str]) -> dict[str, list[str]]:
        """The extensions of each column, including those among ``there`` that columns.json does not list."""
        columns = {name: list(extensions) for name, extensions in self.extensions.items()}
        for extension in there:
            name = self.owner(extension)
            if name is not None and extension not in columns[name]:
                columns[name].append(extension)
        return columns
